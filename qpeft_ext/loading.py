"""Loading base LMs and tokenizers from the Hub or a folder; one clear line when that fails."""

from __future__ import annotations

from pathlib import Path

import torch


def load_lm(name_or_path: str | Path, dtype: str | torch.dtype | None = None, device: str | None = None, **kwargs):
    """An `AutoModelForCausalLM` in eval mode; safetensors only, no remote code.

    Args:
        name_or_path: Hub id or folder.
        dtype: e.g. "bfloat16"; None takes the checkpoint's own.
        device: e.g. "cuda"; None leaves it to transformers (the CPU, unless ``device_map`` is given).
        kwargs: go to ``from_pretrained`` (``device_map``, ``quantization_config``, ``attn_implementation``, …).
    Raises: OSError or ValueError with one line that names the model.
    """
    from transformers import AutoModelForCausalLM

    if isinstance(dtype, str):
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
        dtype = getattr(torch, dtype)
    with _one_line(f"cannot load the base LM {str(name_or_path)!r}"):
        lm = AutoModelForCausalLM.from_pretrained(
            _existing(name_or_path), dtype=dtype or "auto", use_safetensors=True, **kwargs
        )
        return (lm.to(device) if device else lm).eval()


def load_tokenizer(name_or_path: str | Path):
    """The `AutoTokenizer` of a model; no remote code."""
    from transformers import AutoTokenizer

    with _one_line(f"cannot load the tokenizer of {str(name_or_path)!r}"):
        return AutoTokenizer.from_pretrained(_existing(name_or_path))


def _existing(name_or_path: str | Path) -> str:
    """A folder that looks like a path must exist: otherwise the Hub would be asked for it."""
    name = str(name_or_path)
    if not Path(name).is_dir() and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"there is no folder {name}")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise FileNotFoundError("the folder has no config.json")
    return name


class _one_line:
    """Turns the many-line errors of transformers into one line that starts with what was tried."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, traceback) -> bool:
        if error is None or isinstance(error, (KeyboardInterrupt, torch.OutOfMemoryError)):
            return False
        # safetensors and tokenizers raise plain Exceptions for a damaged file
        reason = " ".join(str(error).split())[:300] or kind.__name__
        raise (OSError if isinstance(error, OSError) else ValueError)(f"{self.what}: {reason}") from error
