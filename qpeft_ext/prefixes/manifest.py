"""The manifest of an index: which LM, prompt and dtype its keys and values belong to."""

from __future__ import annotations

from pathlib import Path

from ..prompts.prompt import Prompt
from ..utils.small_files import read_json
from ..utils.text import shorten
from .dtypes import expect_kv_dtype

MANIFEST = "manifest.json"
FORMAT = "qpeft_ext index 1"
FORMAT_WITH_DTYPE = "qpeft_ext index 2"  # keys and values in another dtype than the LM's own
_PROBE = "The moon's 2 tides, rising & falling; naïve été (x_1 = 10%)."


def read_manifest(folder: Path) -> dict:
    """Read the manifest of an index.

    Raises: FileNotFoundError or ValueError if ``folder`` is no index.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no index: it has no {MANIFEST}; make one with qpeft index")
    try:
        manifest = read_json(path)
        if manifest["format"] not in (FORMAT, FORMAT_WITH_DTYPE):
            raise ValueError(f"expected the format {FORMAT!r}, got {shorten(manifest['format'])}")
        expect_kv_dtype(manifest.get("kv_dtype"), "kv_dtype")
        for name, kind in (("complete", bool), ("alone", bool), ("model", dict), ("prompt", dict)):
            if not isinstance(manifest[name], kind):
                raise ValueError(f"{name} must be a {kind.__name__}")
    except (ValueError, KeyError, TypeError) as error:
        why = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: not a readable manifest ({why}); make the index again") from None
    return manifest


def settings_of(model, deterministic: bool, kv_dtype: str | None, passages: dict[str, int] | None) -> dict:
    """Everything that the manifest of an index says about the keys and values in it.

    Args:
        model: the `QPeftModel` that computes them.
        deterministic: whether each is computed unpadded, in a pass of its own.
        kv_dtype: the dtype in which they are stored, where that is not the LM's own.
        passages: settings of the `Splitter` of documents; None: they are not split.
    """
    return {
        "format": FORMAT_WITH_DTYPE if kv_dtype else FORMAT,
        "model": model.engine.version().fingerprint(),
        "kv_dtype": kv_dtype,
        "prompt": prompt_settings(model.prompt),
        "alone": deterministic,
    } | ({"passages": passages} if passages else {})


def expect_same_settings(folder: Path, manifest: dict, settings: dict) -> None:
    """Check that an index may be continued with these settings (`settings_of`).

    Raises: ValueError naming what differs.
    """
    expect_same_lm(folder, manifest, settings["model"])
    expect_same_prompt(folder, manifest, settings["prompt"])
    expect_same_passages(folder, manifest, settings.get("passages"))
    if manifest.get("kv_dtype") != settings["kv_dtype"]:
        raise other_kv_dtype(folder, manifest.get("kv_dtype"), settings["kv_dtype"])
    if manifest["alone"] != settings["alone"]:
        raise ValueError(
            f"the index {folder} was made {'with' if manifest['alone'] else 'without'} "
            f"--deterministic; do so again, or name another folder"
        )


def prompt_settings(prompt: Prompt) -> dict:
    """Everything that decides about the prefix ids of a text: template, tokenizer, limit."""
    empty, probe = prompt.documents(["", _PROBE])
    return {
        "template": list(empty.ids),
        "tokenizer": list(probe.document_ids),
        "max_document_tokens": prompt.max_document_tokens,
        "allow_special_tokens": prompt.allow_special_tokens,
    }


_LM_DIFFERENCES = {
    "model_type": "an LM of type {0}, this one is of type {1}",
    "dtype": "the LM in {0}, this one is in {1}; say --dtype {0}",
    "attention": "the attention implementation {0}, this LM uses {1}",
    "config": "another configuration of the LM (config.json)",
    "weights": "an LM with other weights than this one",
    "adapter": "another adapter in the LM (LoRA), or with none where this LM has one, or the reverse",
    "soft_prompt": "another soft prompt, or with none where this adapter has one, or the reverse",
}
_PROMPT_DIFFERENCES = {
    "max_document_tokens": "max_document_tokens {0}, here it is {1}",
    "tokenizer": "another tokenizer",
    "template": "another template (template, special_tokens, instruction, num_virtual_tokens)",
    "allow_special_tokens": "allow_special_tokens={0}, here it is {1}",
}


def other_kv_dtype(folder: Path, there: str | None, asked: str | None) -> ValueError:
    """The error for keys and values in another dtype than what is asked for; None: the LM's own."""
    own = "the LM's own dtype"
    return ValueError(
        f"the index {folder} has keys and values in {there or own}, expected {asked or own}; use what it was made "
        f"with, or make another one with qpeft index{f' --kv-dtype {asked}' if asked else ''}"
    )


def expect_same_lm(folder: Path, manifest: dict, fingerprint: dict[str, str]) -> None:
    """Check that a fingerprint (`fingerprint_of`) is that of the index's LM.

    Raises: ValueError naming what differs.
    """
    _expect_equal(folder, manifest["model"], fingerprint, _LM_DIFFERENCES)


def expect_same_prompt(folder: Path, manifest: dict, settings: dict) -> None:
    """Check that settings (`prompt_settings`) are those of the index's prompt.

    Raises: ValueError naming what differs.
    """
    # the words of special tokens were special tokens before there was a choice
    _expect_equal(folder, {"allow_special_tokens": True} | manifest["prompt"], settings, _PROMPT_DIFFERENCES)


def expect_same_passages(folder: Path, manifest: dict, settings: dict[str, int] | None) -> None:
    """Check that documents are split as they were for the index, by the settings of a `Splitter` or None.

    Raises: ValueError that says how they were and are.
    """
    if manifest.get("passages") != settings:
        then, now = (
            f"passages ({', '.join(f'{name} {shorten(value)}' for name, value in parts.items())})"
            if isinstance(parts, dict)
            else "whole documents"
            for parts in (manifest.get("passages"), settings)
        )
        raise ValueError(
            f"the index {folder} was made of {then}, here {now} are read; use what it was made with, or make another "
            "one with qpeft index"
        )


def _expect_equal(folder: Path, expected: dict, got: dict, words: dict[str, str]) -> None:
    for name, difference in words.items():
        then, now = expected.get(name), got.get(name)
        if then != now:
            values = (str(value)[:80] for value in (then, now))
            raise ValueError(
                f"the index {folder} was made with {difference.format(*values)}; use "
                "what it was made with, or make another one with qpeft index"
            )
