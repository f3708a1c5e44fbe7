"""Keys of stored prefixes and of the suffixes that read them, put together on a CPU in one call for all pairs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._common import differentiable, fake, refuse_gradient, refuse_transforms
from ._library import registered

_HERE = registered("joined_prefixes")  # computed once, since torch.compile cannot trace the question


def is_supported(prefixes: Sequence[object], suffixes: Tensor) -> bool:
    """Return whether `joined_prefixes` can compute these inputs; prefixes must need no gradient."""
    return _HERE and suffixes.device.type == "cpu" and all(
        isinstance(prefix, Tensor) and prefix.dtype == suffixes.dtype and prefix.device == suffixes.device
        and prefix.is_contiguous() and not prefix.requires_grad for prefix in prefixes)  # fmt: skip


def joined_prefixes(prefixes: Sequence[Tensor], rows: Sequence[int], suffixes: Tensor, slots: int) -> Tensor:
    """Put zeros, the prefix of each pair and its suffix one behind the other, on a CPU. The gradient reaches suffixes.

    Args:
        prefixes: ``[1, H, P, D]`` each, contiguous, of P ≤ slots tokens, without gradient.
        rows: for each pair the place of its prefix.
        suffixes: ``[B, H, L, D]``, in the dtype of the prefixes.
        slots: tokens that all prefixes are left-padded to with zeros.
    Returns: ``[B, H, slots + L, D]``, contiguous.
    Raises:
        ValueError: if a prefix requires a gradient.
        RuntimeError: if `is_supported` does not hold for these inputs, or for a row that is no place of a prefix.
    """
    refuse_transforms("joined_prefixes", suffixes, *prefixes)
    refuse_gradient("joined_prefixes", **{f"prefixes[{i}]": prefix for i, prefix in enumerate(prefixes)})
    return torch.ops.qpeft_ext.joined_prefixes(list(prefixes), list(rows), suffixes, slots)


def reference(prefixes: Sequence[Tensor], rows: Sequence[int], suffixes: Tensor, slots: int) -> Tensor:
    """Compute `joined_prefixes` by its definition."""
    B, H, _, D = suffixes.shape
    padded = suffixes.new_zeros(B, H, slots, D)
    for own, row in zip(padded, rows, strict=True):
        own[:, slots - prefixes[row].shape[2] :] = prefixes[row][0]
    return torch.cat([padded, suffixes], dim=2)


@fake("joined_prefixes")
def _(prefixes, rows, suffixes, slots):
    B, H, L, D = suffixes.shape
    return suffixes.new_empty(B, H, slots + L, D)


def _setup_context(ctx, inputs, output) -> None:
    ctx.count, ctx.slots = len(inputs[0]), inputs[3]


def _autograd(ctx, grad):
    return [None] * ctx.count, None, grad[:, :, ctx.slots :], None


differentiable("joined_prefixes", _setup_context, _autograd)
