"""Attention in bfloat16 on a CPU with AMX, where torch's own kernel is far slower than its matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import differentiable, fake, refuse_transforms
from .hardware import multiplies_bfloat16_by_tiles

_STEP = 32  # bfloat16 numbers in a row of a tile
_HERE = multiplies_bfloat16_by_tiles()  # computed once, since torch.compile cannot trace the question


def is_supported(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Return whether `bfloat16_attention` can compute these inputs on this machine."""
    if not _HERE or mask is None or query.device.type != "cpu":
        return False
    return (query.dtype == key.dtype == value.dtype == torch.bfloat16 and query.shape[-1] == value.shape[-1]
            and query.shape[-1] % _STEP == 0 and query.shape[1] % key.shape[1] == 0
            and mask.dtype == torch.bool and mask.shape[1] == 1)  # fmt: skip


def bfloat16_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Compute softmax(scale * query @ key.T) @ value over the keys that the mask allows, on a CPU with AMX.

    Sums are float32, weights are rounded to bfloat16. Repeated calls return the same bits, gradients included; an item
    of the batch does not depend on the others. The gradient reaches query, key and value.

    Args:
        query: ``[B, H, L, D]``, bfloat16, D a multiple of 32.
        key: ``[B, K, T, D]``, bfloat16; H / K heads of queries share one head of keys.
        value: as key.
        mask: True where a query may look, bool ``[B or 1, 1, L, T]``. A query without any key gets 0.
        scale: factor on the products of query and key.
    Returns: ``[B, L, H, D]``, bfloat16.
    Raises:
        RuntimeError: if `is_supported` does not hold for these inputs.
    """
    refuse_transforms("bfloat16_attention", query, key, value)
    query, key, value, mask = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value, mask))
    return torch.ops.qpeft_ext.bfloat16_attention(query, key, value, mask, scale)[0]


def reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Compute `bfloat16_attention` by its definition, in float64."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(groups, 1) for x in (key, value))
    scores = (scale * query.double() @ key.mT).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1).nan_to_num(0.0) @ value).transpose(1, 2)


@fake("bfloat16_attention")
def _(query, key, value, mask, scale):
    B, H, L, D = query.shape
    return query.new_empty(B, L, H, D), query.new_empty(B, H, L, dtype=torch.float32)


@fake("bfloat16_attention_backward")
def _(grad, out, lse, query, key, value, mask, scale):
    B, H, L, D = query.shape
    return query.new_empty(B, L, H, D), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *tensors)


def _autograd(ctx, grad, _):
    grad_query, grad_key, grad_value = torch.ops.qpeft_ext.bfloat16_attention_backward(
        grad, *ctx.saved_tensors, ctx.scale
    )
    return grad_query.transpose(1, 2), grad_key, grad_value, None, None


differentiable("bfloat16_attention", _setup_context, _autograd)
