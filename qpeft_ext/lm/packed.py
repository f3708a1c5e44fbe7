"""LMs whose weights stay packed, in 8 or 4 bits: what they are made of, and what cannot be done with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def is_packed(weight: Tensor) -> bool:
    """Is this a weight of 8 or 4 bits, or a tensor that stands for several, instead of a plain tensor of floats?"""
    return hasattr(weight, "__tensor_flatten__") or not weight.is_floating_point() or weight.element_size() < 2


def is_coarse(lm: Any) -> bool:
    """Does an LM round so coarsely that two ways to compute the same differ visibly?

    So it is in half precision, and with packed weights in any: some kinds round activations to 8 bits too.
    """
    return lm.get_input_embeddings().weight.element_size() < 4 or any(map(is_packed, lm.parameters()))


def plain_parts(tensor: Tensor) -> dict[str, Tensor]:
    """Return the plain tensors that a tensor is made of, by what is added to its name: {"": itself} for a plain one."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return {"": tensor}
    names, _ = tensor.__tensor_flatten__()
    parts = {name: plain_parts(getattr(tensor, name)) for name in names}
    return {f".{name}{inner}": part for name, inside in parts.items() for inner, part in inside.items()}


def count(parameter: Tensor) -> int:
    """Return how many numbers a parameter stands for; bitsandbytes packs two of 4 bits into one."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return parameter.numel() if shape is None else torch.Size(shape).numel()


def expect_plain(weight: Tensor, what: str) -> None:
    """Check that a weight is no packed one.

    Args:
        weight: the weight.
        what: the beginning of the message: what was tried, with which weight.
    Raises: ValueError for a packed one.
    """
    if is_packed(weight):
        kind = weight.dtype if type(weight) in (Tensor, nn.Parameter) else type(weight).__name__
        raise ValueError(f"{what} is packed ({kind}); load the LM without quantization, not in int8")


def without_gguf_blocks(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of `load_lm` without a config that says to unpack a GGUF file, which is done anyway.

    Raises: ValueError for one that says to keep it packed.
    """
    if options.get("gguf_file"):
        raise ValueError("load_lm: gguf_file is not used; fetch the file and give its path as the name of the LM")
    config = options.get("quantization_config")
    facts = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    if getattr(facts.get("quant_method"), "value", facts.get("quant_method")) != "gguf":
        return dict(options)
    if not facts.get("dequantize"):
        raise ValueError(
            "load_lm: a GGUF file is not kept packed: transformers multiplies its blocks by code that it gets from the "
            "Hub, which is not run; leave quantization_config out, which unpacks the file to bfloat16, or give one of "
            "torchao or bitsandbytes, which packs the weights again"
        )
    return {name: value for name, value in options.items() if name != "quantization_config"}
