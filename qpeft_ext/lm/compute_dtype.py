"""``dtype="auto"``: the number format in which this machine multiplies matrices fastest."""

from __future__ import annotations

import contextlib
import json
import time

import torch

from ..utils.environment import machine
from ..utils.files import cache_folder, write_text
from ..utils.small_files import read_json
from ..utils.torch_state import own_state

_TOKENS, _WIDTH, _INNER = 512, 1024, 2048  # a matrix product of a small LM, long enough to be timed
_ROUNDS = 5


def resolve_dtype(dtype: str | torch.dtype | None, device: str | None = None) -> torch.dtype | None:
    """Return the dtype of a name; None stays None.

    Args:
        dtype: "float32", "bfloat16", "float16", "int8", "auto" or a dtype. "auto" is `fastest_dtype`.
        device: where the LM computes, for "auto"; None is the CPU.
    Raises: ValueError for another name.
    """
    if dtype == "auto":
        return fastest_dtype(device)
    if isinstance(dtype, str):
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"dtype must be float32, bfloat16, float16, int8 or auto, got {dtype!r}")
        return found
    return dtype


def fastest_dtype(device: str | None = None) -> torch.dtype:
    """Return bfloat16 or float32, whichever this device multiplies faster.

    A CPU is timed for a fraction of a second, once for each number of threads and version of torch: the result is kept
    in the cache folder. A GPU has bfloat16 where it supports that.
    """
    kind = torch.device(device or "cpu").type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if kind != "cpu":
        return torch.float32
    facts = machine()
    key = f"{facts['cpu']}; {facts['threads']}; torch {torch.__version__}"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        known = read_json(cache_folder() / "compute_dtype.json")
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[known[key]]
    faster = torch.bfloat16 if _seconds(torch.bfloat16) < _seconds(torch.float32) else torch.float32
    _remember(key, str(faster).removeprefix("torch."))
    return faster


@own_state()
@torch.no_grad()
def _seconds(dtype: torch.dtype) -> float:
    """Return the time of the fastest of a few matrix products."""
    states, weight = (torch.ones(rows, _WIDTH, dtype=dtype, device="cpu") for rows in (_TOKENS, _INNER))
    best = float("inf")
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        torch.nn.functional.linear(states, weight)
        best = min(best, time.perf_counter() - start)
    return best


def _remember(key: str, dtype: str) -> None:
    """Keep a result in the cache folder; where that cannot be written, the next process measures again."""
    with contextlib.suppress(OSError, ValueError):
        path = cache_folder() / "compute_dtype.json"
        known: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError):
            content = read_json(path)
            known = content if isinstance(content, dict) else {}
        write_text(path, json.dumps(known | {key: dtype}, indent=2) + "\n")
