"""Rotary embedding of queries and keys on a CPU, in one pass over memory where torch needs five."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import differentiable, fake, refuse_gradient, refuse_transforms
from ._library import registered

_HERE = registered("rotary")  # computed once, since torch.compile cannot trace the question
_DTYPES = (torch.float32, torch.bfloat16)


def is_supported(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Return whether `rotary` can compute these inputs; cos and sin must need no gradient."""
    return (_HERE and x.device.type == "cpu" and x.dtype == cos.dtype == sin.dtype and x.dtype in _DTYPES
            and x.dim() == 4 and x.stride(-1) == 1 and x.shape[-1] % 2 == 0 and cos.shape == sin.shape
            and cos.shape[1:] == x.shape[2:] and cos.shape[0] in (1, x.shape[0])
            and not cos.requires_grad and not sin.requires_grad)  # fmt: skip


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute x * cos + (-x₂, x₁) * sin, where x₁ and x₂ are the halves of the last dimension of x, on a CPU.

    In bfloat16 both products and their sum are rounded. A token does not depend on the others. The gradient reaches x.

    Args:
        x: ``[B, H, L, D]``, float32 or bfloat16, with last stride 1.
        cos, sin: ``[B or 1, L, D]``, in the same dtype, without gradient.
    Returns: shape and dtype of x, contiguous.
    Raises:
        ValueError: if cos or sin requires a gradient.
        RuntimeError: if `is_supported` does not hold for these inputs.
    """
    refuse_transforms("rotary", x, cos, sin)
    refuse_gradient("rotary", cos=cos, sin=sin)
    return torch.ops.qpeft_ext.rotary(x, cos, sin)


def reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute `rotary` by its definition, in float64."""
    first, second = x.double().chunk(2, dim=-1)
    return x.double() * cos.double()[:, None] + torch.cat([-second, first], dim=-1) * sin.double()[:, None]


@fake("rotary")
def _(x, cos, sin, inverse=False):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:3])
    ctx.inverse = len(inputs) > 3 and inputs[3]


def _autograd(ctx, grad):
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    return torch.ops.qpeft_ext.rotary(grad, *ctx.saved_tensors, not ctx.inverse), *[None] * (
        len(ctx.needs_input_grad) - 1
    )


differentiable("rotary", _setup_context, _autograd)
