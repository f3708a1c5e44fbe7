"""Root-mean-square norm of bfloat16 on a CPU, in one pass where torch takes six, most of them in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import differentiable, fake, refuse_forward_mode
from .hardware import has_bfloat16_products

_HERE = has_bfloat16_products()  # a constant, since torch.compile cannot ask for it


def is_supported(x: Tensor, weight: Tensor) -> bool:
    """Whether `bfloat16_rms_norm` takes these, on this machine. The weight gets no gradient."""
    return (_HERE and x.device.type == weight.device.type == "cpu" and x.dtype == weight.dtype == torch.bfloat16
            and weight.dim() == 1 and x.dim() > 1 and x.shape[-1] == len(weight) and weight.is_contiguous()
            and not weight.requires_grad)  # fmt: skip


def bfloat16_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * (x / sqrt(mean(x²) + eps)) over the last dimension, in float32; quotient and product are rounded.

    Args: x: ``[..., D]``, bfloat16 on a CPU with products of it.  weight: ``[D]``, the same, without gradient.
    Returns: as x.
    Raises: ValueError for a weight that asks for a gradient; RuntimeError for what else `is_supported` does not take.
    """
    refuse_forward_mode("bfloat16_rms_norm", x, weight)
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("bfloat16_rms_norm: weight gets no gradient, so it must not ask for one")
    rows = x.reshape(-1, x.shape[-1])
    return torch.ops.qpeft_ext.bfloat16_rms_norm(rows, weight, eps)[0].view(x.shape)


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition, in float64."""
    x = x.double()
    return weight.double() * (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt())


@fake("bfloat16_rms_norm")
def _(x, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)


@fake("bfloat16_rms_norm_backward")
def _(grad, x, weight, scale):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:2], output[1])


def _autograd(ctx, grad, _):
    return torch.ops.qpeft_ext.bfloat16_rms_norm_backward(grad, *ctx.saved_tensors), None, None


differentiable("bfloat16_rms_norm", _setup_context, _autograd)
