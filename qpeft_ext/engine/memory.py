"""Splits one budget in bytes into a token budget and cache budgets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .base import BaseEngine
from .groups import READ_TOKENS_PER_TOKEN
from .schedule import default_tokens

FIXED_BYTES = 192 << 20  # chunk of the head (64 MiB), clue vectors (32), the clue operators' blocks, token ids
FREE_SHARE = 0.9  # of the free memory of a GPU; the rest is for fragments


@dataclass(frozen=True)
class MemoryPlan:
    """Budgets of a reranker.

    max_tokens_per_batch: tokens in a pass.
    cache_bytes: for a `DocumentCache`.
    projected_bytes: for the projected table rows of Q-PEFT-A.
    """

    max_tokens_per_batch: int
    cache_bytes: int
    projected_bytes: int


def bytes_per_token(engine: BaseEngine[Any, Any]) -> int:
    """Estimate the bytes that a token of the budget takes at most in a pass.

    They are: what is kept of it for later passes (its keys and values, or its encoder state); a layer's copies of the
    8 prefix tokens that a suffix token's share of the budget may read; and a layer's results, 8 vectors of the hidden
    size and 3 of the MLP's inner size.

    Args:
        engine: of the LM.
    """
    config = engine.lm.config.get_text_config()
    width, itemsize = engine.table.shape[1], engine.table.element_size()
    names = ("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim")
    inner = next((size for name in names if (size := getattr(config, name, None))), 4 * width)
    kept, read = engine.token_bytes()
    return kept + int(READ_TOKENS_PER_TOKEN * read) + itemsize * (8 * width + 3 * inner)


def plan_memory(engine: BaseEngine[Any, Any], max_memory: int | str, attention_clues: bool) -> MemoryPlan:
    """Split ``max_memory`` bytes, which do not include the weights.

    192 MiB are set aside. Half of the rest is for passes: as many tokens as `bytes_per_token` allows, but not more than
    `default_tokens`, because more would not be faster. A sixteenth, at most 256 MiB, is for projected rows of Q-PEFT-A,
    and the remainder is for cached prefixes.

    Args:
        engine: of the LM.
        max_memory: bytes; or "free": nine tenths of the free memory of a CUDA device.
        attention_clues: whether there are projected rows of Q-PEFT-A.
    Raises: ValueError if it is too small for passes of 256 tokens, or "free" and not on CUDA.
    """
    if max_memory == "free":
        if engine.device.type != "cuda":
            raise ValueError("max_memory must be given in bytes: only a CUDA device says how much is free")
        max_memory = int(FREE_SHARE * torch.cuda.mem_get_info(engine.device)[0])
    if not isinstance(max_memory, int):
        raise ValueError(f"max_memory must be a whole number of bytes or 'free', got {max_memory!r}")
    each, rest = bytes_per_token(engine), max_memory - FIXED_BYTES
    least = FIXED_BYTES + 512 * each
    if max_memory < least:
        raise ValueError(
            f"max_memory must be at least {least / 2**20:.0f} MiB for this LM, besides its weights; got "
            f"{max_memory / 2**20:.0f} MiB"
        )
    tokens = min(rest // 2 // each, default_tokens(engine.device))
    projected = min(rest // 16, 256 << 20) if attention_clues else 0
    return MemoryPlan(tokens, rest - tokens * each - projected, projected)
