"""Root-mean-square norm on a CPU, in one pass over memory where torch needs four to six."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import differentiable, fake, refuse_gradient, refuse_transforms
from ._library import registered

_HERE = registered("rms_norm")  # computed once, since torch.compile cannot trace the question
_DTYPES = (torch.float32, torch.bfloat16)


def is_supported(x: Tensor, weight: Tensor) -> bool:
    """Return whether `rms_norm` can compute these inputs; the weight must get no gradient from it.

    A norm that is trained is computed by it too where no gradient is kept: what a model scores is then the same before
    it is saved and after it was loaded, frozen.
    """
    return (_HERE and x.device.type == weight.device.type == "cpu" and x.dtype == weight.dtype in _DTYPES
            and weight.dim() == 1 and x.dim() > 1 and x.shape[-1] == len(weight) and weight.is_contiguous()
            and not (weight.requires_grad and torch.is_grad_enabled()))  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute weight * (x / sqrt(mean(x²) + eps)) over the last dimension, on a CPU.

    The mean is float32; for bfloat16 the quotient and the product are rounded. A row does not depend on the others. The
    gradient reaches x only.

    Args:
        x: ``[..., D]``, float32 or bfloat16.
        weight: ``[D]``, in the same dtype, without gradient.
        eps: added to the mean square.
    Returns: shape and dtype of x.
    Raises:
        ValueError: if the weight requires a gradient.
        RuntimeError: if `is_supported` does not hold for these inputs.
    """
    refuse_transforms("rms_norm", x, weight)
    refuse_gradient("rms_norm", weight=weight)
    rows = x.flatten(0, -2)
    return torch.ops.qpeft_ext.rms_norm(rows, weight, eps)[0].view(x.shape)


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute `rms_norm` by its definition, in float64."""
    x = x.double()
    return weight.double() * (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt())


@fake("rms_norm")
def _(x, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)


@fake("rms_norm_backward")
def _(grad, x, weight, scale):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:2], output[1])


def _autograd(ctx, grad, _):
    return torch.ops.qpeft_ext.rms_norm_backward(grad, *ctx.saved_tensors), None, None


differentiable("rms_norm", _setup_context, _autograd)
