"""What this processor multiplies fast, and the shapes that suit it."""

from __future__ import annotations

from functools import cache

import torch

from ._library import registered


def shape_step(device: torch.device, dtype: torch.dtype) -> int:
    """Of what the pairs and the width of a suffix pass are multiples, as far as they can. ``dtype``: of the LM.

    On a CPU oneDNN, which multiplies bf16, makes code for every new number of rows (1.6 ms and 0.9 MB for each of the 5
    to 25 shapes of a pass) and keeps that of the last 1,024.
    """
    return 8 if device.type == "cpu" and dtype == torch.bfloat16 else 1


@cache
def has_bfloat16_products() -> bool:
    """Whether this processor has instructions for them that are faster than float32."""
    return registered() and torch.ops.qpeft_ext.bfloat16_instructions() > 0


@cache
def multiplies_bfloat16_by_tiles() -> bool:
    """Whether this processor has AMX, with which the products of a bf16 LM are several times faster than all else."""
    return registered() and torch.ops.qpeft_ext.bfloat16_instructions() == 2


def few_heights(height: int) -> int:
    """The height or a little more (3 % on average, 6 % at most): one of 16 between a power of two and the next."""
    step = 1 << max(0, height.bit_length() - 5)
    return -(-height // step) * step


@cache
def _has_onednn() -> bool:
    """Whether this torch has oneDNN, and the product that torch.compile takes for linear layers."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
