"""LMs whose linear layers compute in 8 bits on a CPU (``dtype="int8"``); everything else of them is float32."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._library import registered
from ..ops.hardware import has_int8_products
from ..ops.int8_linear import Int8Weight, int8_linear, takes
from .passes import hooked
from .probe_ids import ordinary_ids

logger = logging.getLogger(__name__)
_APART = 4  # inputs of a layer that are not rounded
_PROBE = (4, 64)  # rows and tokens of the pass that finds them
_BUFFERS = ("scale", "sums", "columns", "exact")
_FEWEST_OUTPUTS = 64  # smaller layers (routers of experts) cost nothing, and choose rather than compute


class Int8Linear(nn.Linear):
    """A linear layer with weights in 8 bits, that rounds what it reads to 8 bits (`ops.int8_linear`).

    It is frozen. It reads any dtype and returns the same; where an adapter of `peft` or hooks add to its output, that
    part stays in their own dtype.

    Args:
        linear: the layer that it replaces.
        columns: inputs that are not rounded.
    Attributes:
        weight, scale, sums, columns, exact: those of `Int8Weight`.
        bias: float32 [out_features], or None.
    Raises: ValueError for a layer with numbers of inputs or outputs that `ops.int8_linear` does not take, or with a
        weight that is not finite.
    """

    scale: Tensor
    sums: Tensor
    columns: Tensor
    exact: Tensor

    def __init__(self, linear: nn.Linear, columns: Sequence[int] = ()) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        layer = Int8Weight.of(linear.weight, columns)
        self.weight = nn.Parameter(layer.weight, requires_grad=False)
        for name in _BUFFERS:
            self.register_buffer(name, getattr(layer, name))
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), requires_grad=False)

    @property
    def layer(self) -> Int8Weight:
        """The weight, as the operator takes it."""
        return Int8Weight(self.weight, *(getattr(self, name) for name in _BUFFERS))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).float()
        bias = None if self.bias is None else self.bias.float()
        return int8_linear(rows, self.layer, bias).view(*x.shape[:-1], self.out_features).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move to another device, but keep the numbers in float32 where the LM gets another dtype."""
        scale, exact = self.scale, self.exact
        super()._apply(fn, recurse)
        self.scale, self.exact = scale.to(self.scale.device), exact.to(self.scale.device)
        return self


def expect_int8_possible(device: str | None, options: Mapping[str, Any]) -> None:
    """Check that an LM can be loaded with ``dtype="int8"``; say so once where it will be slow.

    Args:
        device, options: what `load_lm` was given, options by keyword.
    Raises: ValueError for another device than the CPU, and for weights that are packed in another way.
    """
    if torch.device(device or "cpu").type != "cpu" or options.get("device_map") is not None:
        where = device or f"device_map={options['device_map']!r}"
        raise ValueError(
            f"dtype='int8' is for CPUs, got {where}; take device='cpu', or bfloat16 with a quantization_config there"
        )
    if options.get("quantization_config") is not None:
        raise ValueError("dtype='int8' packs weights itself; give it or a quantization_config, not both")
    if not has_int8_products():
        _say_slow()


@cache
def _say_slow() -> None:
    why = "this processor has no AVX512-VNNI" if registered("int8_linear") else "qpeft_ext._C is of an earlier build"
    logger.warning(f"dtype='int8': {why}, so that int8 is slower here than float32")


def is_int8(lm: nn.Module) -> bool:
    """Does an LM have layers that compute in 8 bits?"""
    return any(isinstance(module, Int8Linear) for module in lm.modules())


@torch.no_grad()
def to_int8(lm: Any) -> None:
    """Make the linear layers of an LM compute in 8 bits, in place.

    The head and the embeddings stay float32, as do layers with less than 64 outputs and those whose number of outputs
    is no multiple of 16, or of inputs none of 64. In each layer the few inputs that are largest in a pass over tokens
    from the whole vocabulary stay float32 too: most LMs have some that are ten times as large as the others.

    Args:
        lm: an LM of transformers, in float32, on the CPU.
    Raises: ValueError for an LM without a layer that can be in 8 bits, or with a weight that is not finite.
    """
    head = lm.get_output_embeddings()
    layers = {
        name: module
        for name, module in lm.named_modules()
        if type(module) is nn.Linear and module is not head and module.out_features >= _FEWEST_OUTPUTS
        and takes(module.out_features, module.in_features)
    }  # fmt: skip
    if not layers:
        raise ValueError(
            f"dtype='int8': no layer of this {lm.config.model_type} LM can compute in 8 bits (linear layers with at "
            "least 64 outputs, outputs % 16 == 0, inputs % 64 == 0); load it in float32"
        )
    largest = _largest_inputs(lm, list(layers.values()))
    for name, module in layers.items():
        lm.set_submodule(name, Int8Linear(module, largest.get(module, ())))


def _largest_inputs(lm: Any, layers: Sequence[nn.Module]) -> dict[nn.Module, list[int]]:
    """The inputs of each layer with the largest share of a row's square, summed over the rows of a pass."""
    shares: dict[nn.Module, Tensor] = {}

    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        square = inputs[0].reshape(-1, inputs[0].shape[-1]).square()
        share = (square / square.sum(1, keepdim=True).clamp_min(torch.finfo(square.dtype).tiny)).sum(0)
        shares[module] = shares[module] + share if module in shares else share

    context = getattr(lm.config.get_text_config(), "max_position_embeddings", None) or _PROBE[1]
    rows, tokens = _PROBE[0], min(_PROBE[1], context)
    ids = torch.tensor(ordinary_ids(lm, rows * tokens)).view(rows, tokens)
    given = {"decoder_input_ids": ids} if getattr(lm.config, "is_encoder_decoder", False) else {}
    with hooked(before=[(layer, add) for layer in layers]):
        lm.eval()(input_ids=ids, **given)
    return {layer: sorted(share.topk(_APART).indices.tolist()) for layer, share in shares.items()}
