"""Root-mean-square norm of bfloat16 on a CPU, in one pass over memory where torch needs six, most in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import differentiable, fake, refuse_forward_mode
from .hardware import has_bfloat16_products

_HERE = has_bfloat16_products()  # computed once, since torch.compile cannot trace the question


def is_supported(x: Tensor, weight: Tensor) -> bool:
    """Return whether `bfloat16_rms_norm` can compute these inputs on this machine; the weight must need no gradient."""
    return (_HERE and x.device.type == weight.device.type == "cpu" and x.dtype == weight.dtype == torch.bfloat16
            and weight.dim() == 1 and x.dim() > 1 and x.shape[-1] == len(weight) and weight.is_contiguous()
            and not weight.requires_grad)  # fmt: skip


def bfloat16_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute weight * (x / sqrt(mean(x²) + eps)) over the last dimension, on a CPU with AMX or AVX512-BF16.

    The mean is float32; the quotient and the product are rounded to bfloat16. A row does not depend on the others. The
    gradient reaches x only.

    Args:
        x: ``[..., D]``, bfloat16.
        weight: ``[D]``, bfloat16, without gradient.
        eps: added to the mean square.
    Returns: shape and dtype of x.
    Raises:
        ValueError: if the weight requires a gradient.
        RuntimeError: if `is_supported` does not hold for these inputs.
    """
    refuse_forward_mode("bfloat16_rms_norm", x, weight)
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("bfloat16_rms_norm: weight gets no gradient, so it must not ask for one")
    rows = x.reshape(-1, x.shape[-1])
    return torch.ops.qpeft_ext.bfloat16_rms_norm(rows, weight, eps)[0].view(x.shape)


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute `bfloat16_rms_norm` by its definition, in float64."""
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
