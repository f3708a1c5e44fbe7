"""silu(gate) * up on a CPU, the middle of a gated feed-forward layer, in one pass over memory where torch needs two."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import differentiable, fake, refuse_transforms
from ._library import registered

_HERE = registered("gated_silu")  # computed once, since torch.compile cannot trace the question
_DTYPES = (torch.float32, torch.bfloat16)


def is_supported(gate: Tensor, up: Tensor) -> bool:
    """Return whether `gated_silu` can compute these inputs."""
    return (_HERE and gate.device.type == up.device.type == "cpu" and gate.dtype == up.dtype in _DTYPES
            and gate.shape == up.shape and gate.dim() > 1)  # fmt: skip


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute gate * sigmoid(gate) * up, on a CPU.

    In bfloat16 silu(gate) and the product are rounded. A row does not depend on the others.

    Args:
        gate, up: ``[..., D]`` of one shape, float32 or bfloat16.
    Returns: shape and dtype of gate.
    Raises: RuntimeError if `is_supported` does not hold for these inputs.
    """
    refuse_transforms("gated_silu", gate, up)
    return torch.ops.qpeft_ext.gated_silu(gate.flatten(0, -2), up.flatten(0, -2)).view(gate.shape)


def reference(gate: Tensor, up: Tensor) -> Tensor:
    """Compute `gated_silu` by its definition, in float64."""
    gate = gate.double()
    return gate * gate.sigmoid() * up.double()


@fake("gated_silu")
def _(gate, up):
    return gate.new_empty(gate.shape)


@fake("gated_silu_backward")
def _(grad, gate, up):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx, grad):
    return torch.ops.qpeft_ext.gated_silu_backward(grad, *ctx.saved_tensors)


differentiable("gated_silu", _setup_context, _autograd)
