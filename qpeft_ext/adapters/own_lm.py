"""The LM that an adapter was trained on: how the adapter's config describes it, and how it is recognised."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..config import QPeftConfig
from ..utils.torch_state import own_state

_PROBES = 16  # embedding entries by which an LM is recognised
_SIZES = "model_type", "vocab_size", "hidden_size"
# short enough for the end of a line that the command line cuts in its middle
_GIVE = "give the LM: base_model= (Reranker), lm= (QPeftModel), --base-model (command line)"
_COPY = "copy the files of that LM's tokenizer into the adapter's folder lm"


@contextmanager
def finding_own_lm(adapter: str | os.PathLike[str], config: QPeftConfig, lm: object = None) -> Iterator[None]:
    """A context in which an adapter's LM is looked for: where that fails, the error says how to give it.

    Args:
        adapter: its name, for messages.
        config: of the adapter.
        lm: the LM that the user gave; None where the one that the adapter names is looked for.
    Raises: ValueError if nobody names the LM; OSError if the one that the adapter names is not found.
    """
    facts = config.base_model or {}
    sizes = ", ".join(f"{name} {facts[name]}" for name in _SIZES if name in facts)
    about = f"{adapter}: the adapter of an LM with {sizes}" if sizes else f"{adapter}"
    remedy = _COPY if config.train_lm else _GIVE  # one that has an LM of its own takes no other
    if lm is None and not config.base_model_name_or_path:
        raise ValueError(f"{about}: it does not name its base LM; {remedy}")
    try:
        yield
    except OSError as error:
        if lm is not None:
            raise
        raise OSError(f"{about}: {error}; {remedy}") from error


def revision_of(config: QPeftConfig, lm: str | os.PathLike[str] | None = None) -> str | None:
    """Return the commit on the Hub that an adapter's LM was loaded from; None where it was not, or for another LM.

    Args:
        config: of the adapter.
        lm: the name of the LM that is loaded; None is the adapter's own.
    """
    own = lm is None or str(lm) == config.base_model_name_or_path
    return (config.base_model or {}).get("revision") if own else None


def describe_lm(engine) -> dict:
    """Facts by which an adapter recognises its LM: its type, sizes, and a few entries of the embedding table.

    For an LM from a GGUF file these include the SHA-256 of the file, for one from the Hub its commit ("revision").
    """
    table = engine.table.detach()
    vocabulary, width = table.shape
    probes = [(i * 7919 % vocabulary, i * 104729 % width) for i in range(1, _PROBES + 1)]
    facts = {
        "model_type": engine.lm.config.model_type,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "embedding_probe": [float(table[row, column]) for row, column in probes],
    }
    for name, attribute in (("gguf_sha256", "gguf_sha256"), ("revision", "_commit_hash")):
        if (value := getattr(engine.lm.config, attribute, None)) is not None:
            facts[name] = str(value)
    return facts


@own_state()
def expect_same_lm(folder: Path, config: QPeftConfig, engine) -> None:
    """Check that an LM is the one that an adapter was trained on.

    Args:
        folder: the adapter's, for messages.
        config: of the adapter.
        engine: the LM's.
    Raises: ValueError that says what differs.
    """
    expected, got = config.base_model, describe_lm(engine)
    if expected is None or config.train_lm:  # then the LM came from the adapter's own folder
        return
    for name in _SIZES:
        if expected.get(name) != got[name]:
            raise ValueError(
                f"{folder}: the adapter was trained on an LM with {name} {expected.get(name)}, "
                f"this one has {got[name]}; load its own base LM, {config.base_model_name_or_path}"
            )
    its_file, file = (str(lm.get("gguf_sha256", ""))[:64] for lm in (expected, got))
    if its_file and file and its_file != file:
        raise ValueError(
            f"{folder}: the adapter was trained on a GGUF file with the SHA-256 {its_file[:16]}…, this one has "
            f"{file[:16]}…; load its own base LM, {config.base_model_name_or_path}"
        )
    # other entries than rounding to half precision explains: another LM of the same shape
    ours, theirs = (torch.tensor(lm["embedding_probe"], dtype=torch.float32) for lm in (got, expected))
    if ours.shape != theirs.shape:
        raise ValueError(
            f"{folder}: embedding_probe of the adapter must have {len(ours)} numbers, got {len(theirs)}; "
            "save the adapter again"
        )
    if not torch.allclose(ours, theirs, rtol=2e-2, atol=1e-2 * float(theirs.abs().max())):
        raise ValueError(
            f"{folder}: the adapter was trained on an LM with other weights than this "
            f"{got['model_type']}; load its own base LM, {config.base_model_name_or_path}"
        )
