"""Linear layers with weights and activations in 8 bits (W8A8) on a CPU: float32 in, float32 out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import expect_device, expect_dtype, expect_shape
from ._common import differentiable, fake, outside_autocast, refuse_transforms
from ._library import registered, uses_reference

WORDS, INPUTS = 16, 64  # outputs and inputs of a layer must be multiples of these; so many inputs are turned together
_FOUR = 4  # inputs that are multiplied at a time


class Int8Weight(NamedTuple):
    """The weight W of a linear layer, ``[C, D]``, in 8 bits: each output's numbers, turned, with one scale.

    Some columns of W may stay float32. In the others, each 64 inputs are turned by a Hadamard matrix H, which
    spreads a large number over all of them, and so are the inputs of the product: x Wᵀ = (H x)(H W)ᵀ / 64.

    Attributes:
        weight: H W / (64 scale), -127 to 127, in the order of the kernels, ``[C / 16, D / 4, 16, 4]`` (outputs by
            inputs), int8.
        scale: ``[C]``, float32.
        sums: of ``weight`` for each output, ``[C]``, int32; the product needs them, since it adds 128 to activations.
        columns: the inputs that are neither turned nor rounded, ``[R]``, int32.
        exact: their weights, ``[R, C]``, float32.
    Source: turning as in QuaRot, Ashkboos et al. 2024, https://arxiv.org/abs/2404.00456; columns that are not rounded
        as in LLM.int8(), Dettmers et al. 2022, https://arxiv.org/abs/2208.07339.
    """

    weight: Tensor
    scale: Tensor
    sums: Tensor
    columns: Tensor
    exact: Tensor

    @classmethod
    def of(cls, weight: Tensor, columns: Sequence[int] = ()) -> Int8Weight:
        """Round a weight ``[C, D]`` to 8 bits.

        Args:
            weight: in any floating dtype.
            columns: those that stay float32.
        Raises: ValueError if C is no multiple of 16 or D none of 64, or if a number is not finite.
        """
        C, D = weight.shape
        if not takes(C, D):
            raise ValueError(f"Int8Weight: weight must be [C, D] with C % {WORDS} == D % {INPUTS} == 0, got [{C}, {D}]")
        rest = weight.detach().float().clone()
        apart = torch.tensor(list(columns), dtype=torch.int32, device=weight.device)
        exact = rest[:, apart].T.contiguous()
        rest[:, apart] = 0
        turned = turn(rest) / INPUTS
        scale = turned.abs().amax(1) / 127
        if not (scale.isfinite().all() and exact.isfinite().all()):
            raise ValueError("Int8Weight: weight must be finite")
        rounded = (turned / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round().to(torch.int8)
        blocks = rounded.view(C // WORDS, WORDS, D // _FOUR, _FOUR).transpose(1, 2).contiguous()
        return cls(blocks, scale, rounded.sum(1, dtype=torch.int32), apart, exact)

    @property
    def rounded(self) -> Tensor:
        """The weight in 8 bits, ``[C, D]`` int8, as a copy."""
        blocks, fours = self.weight.shape[:2]
        return self.weight.transpose(1, 2).reshape(blocks * WORDS, fours * _FOUR)

    def dequantized(self) -> Tensor:
        """The weight that the layer has, ``[C, D]`` float32, as a copy."""
        weight = turn(self.rounded.float().mul_(self.scale[:, None]))
        weight[:, self.columns] = self.exact.T
        return weight


def takes(outputs: int, inputs: int) -> bool:
    """Return whether a layer has numbers of outputs and inputs that `int8_linear` takes."""
    return outputs % WORDS == 0 and inputs % INPUTS == 0 and 0 < inputs <= 1 << 16


def turn(x: Tensor) -> Tensor:
    """Multiply each 64 neighbours by the Hadamard matrix H, H[i, j] = (-1)^(number of bits that i and j share)."""
    hadamard = torch.ones(1, 1, dtype=x.dtype, device=x.device)
    while len(hadamard) < INPUTS:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    return (x.reshape(-1, INPUTS) @ hadamard).view(x.shape)


@outside_autocast
def int8_linear(x: Tensor, layer: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """Compute ``x @ W.T + bias`` with W, and x just before the product, in 8 bits.

    A row of x, turned, is rounded by its own scale, its largest number / 127, so that it does not depend on the others;
    the integers are summed exactly. The gradient is that of a layer with the float32 weight ``layer.dequantized()``, as
    if x were not rounded; it reaches x and bias.

    Args:
        x: ``[N, D]``, float32.
        layer: of W, ``[C, D]``; it gets no gradient.
        bias: ``[C]``, float32, or None.
    Returns: ``[N, C]``, float32. A row of x with a number that is not finite gives no finite number.
    Raises: ValueError for other shapes or devices, TypeError for other dtypes.

    Example: ::

        >>> import torch
        >>> from qpeft_ext.ops.int8_linear import Int8Weight, int8_linear
        >>> layer = Int8Weight.of(torch.full((16, 64), 0.5))
        >>> int8_linear(torch.ones(1, 64), layer)[0, :3]
        tensor([32., 32., 32.])
    """
    op = "int8_linear"
    expect_shape(op, "x", x, "[N, D]", (None, layer.weight.shape[1] * _FOUR))
    expect_dtype(op, "x", x, torch.float32)
    expect_device(op, "weight", layer.weight, "x", x)
    if bias is not None:
        expect_shape(op, "bias", bias, "[C]", (len(layer.scale),))
        expect_dtype(op, "bias", bias, torch.float32)
        expect_device(op, "bias", bias, "x", x)
    if uses_reference(x.device) or not registered(op) or x.device.type not in ("cpu", "meta"):
        return reference(x, layer, bias)
    refuse_transforms(op, x, bias)
    return torch.ops.qpeft_ext.int8_linear(x, *layer, bias)


def reference(x: Tensor, layer: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """Compute `int8_linear` by its definition, in float64; the gradient passes the rounding as if it were not there."""
    own = x.detach().double()
    apart = own[:, layer.columns]
    own[:, layer.columns] = 0
    turned = turn(own)
    row_scale = turned.abs().amax(1, keepdim=True) / 127
    rounded = turn((turned / row_scale.where(row_scale != 0, 1)).round() * row_scale) / INPUTS
    rounded[:, layer.columns] = apart
    product = (x + (rounded - x.detach())) @ layer.dequantized().double().T
    return (product if bias is None else product + bias).float()


@fake("int8_linear")
def _(x, weight, scale, sums, columns, exact, bias, instructions=2):
    return x.new_empty(x.shape[0], scale.shape[0])


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:6])


def _autograd(ctx, grad):
    wants_x, _, _, _, _, _, wants_bias, *others = ctx.needs_input_grad  # without `instructions` if that is the default
    grad_x = grad @ Int8Weight(*ctx.saved_tensors).dequantized() if wants_x else None
    return grad_x, *[None] * 5, grad.sum(0) if wants_bias else None, *(None for _ in others)


differentiable("int8_linear", _setup_context, _autograd)
