"""Which products of matrices this processor has fast instructions for, and which shapes suit them."""

from __future__ import annotations

from functools import cache

import torch

from ._library import registered


def shape_step(device: torch.device, dtype: torch.dtype) -> int:
    """Return the multiple to which a suffix pass rounds its number of rows and its width; 1 means no rounding.

    It is 8 for an LM of ``dtype`` bfloat16 on a CPU, because oneDNN, which multiplies bfloat16 there, compiles code for
    every new number of rows (1.6 ms and 0.9 MB for each of the 5 to 25 shapes of a pass) and keeps the last 1,024.
    """
    return 8 if device.type == "cpu" and dtype == torch.bfloat16 else 1


@cache
def has_bfloat16_products() -> bool:
    """Return whether this processor has instructions for products of bfloat16 that are faster than float32."""
    return registered() and torch.ops.qpeft_ext.bfloat16_instructions() > 0


@cache
def multiplies_bfloat16_by_tiles() -> bool:
    """Return whether this processor has AMX, which multiplies bfloat16 several times faster than anything else."""
    return registered() and torch.ops.qpeft_ext.bfloat16_instructions() == 2


@cache
def has_int8_products() -> bool:
    """Return whether this processor has instructions for products of 8 bits that are faster than float32."""
    return registered("int8_instructions") and torch.ops.qpeft_ext.int8_instructions() > 0


def few_heights(height: int) -> int:
    """Round a height up to one of 16 between a power of two and the next: 3 % more on average, 6 % at most."""
    step = 1 << max(0, height.bit_length() - 5)
    return -(-height // step) * step


@cache
def _has_onednn() -> bool:
    """Return whether this torch has oneDNN, and its operator that torch.compile uses for linear layers."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
