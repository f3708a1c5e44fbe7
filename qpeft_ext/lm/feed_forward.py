"""Feed-forward layers of Llama, Qwen, Mistral and others on CPUs: between their products is `ops.gated_silu`."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.gated_silu import gated_silu, is_supported
from ..utils.memory import raise_if_out_of_memory
from .errors import LM_ERRORS

_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def is_ours(module: nn.Module, dtype: torch.dtype) -> bool:
    """Does a module compute down_proj(silu(gate_proj(x)) * up_proj(x)), which we have a faster form of?

    It is tried with stand-ins for its projections, so that no product is computed.

    Args:
        module: any.
        dtype: of the activations.
    """
    if "forward" in vars(module) or {name for name, _ in module.named_children()} != _PARTS:
        return False
    # from where silu is 0 to where it is the identity
    x = torch.stack([torch.linspace(-20, 20, 64), torch.linspace(-1, 1, 64)]).to(dtype)
    tried: Any = copy(module)
    stand_ins = {"gate_proj": nn.Identity(), "up_proj": _Reversed(), "down_proj": nn.Identity()}
    tried._modules = module._modules | stand_ins
    if not is_supported(x, x):
        return False
    try:
        found = type(module).forward(tried, x)
    except LM_ERRORS as error:  # it needs more of its projections than their output
        raise_if_out_of_memory(error)
        return False
    expected = gated_silu(x, x.flip(-1))
    return isinstance(found, Tensor) and torch.allclose(found, expected, rtol=1e-5 if dtype == torch.float32 else 1e-2)


def forward(module: Any, x: Tensor) -> Tensor | None:
    """Compute a module that `is_ours`; None for an input that ours does not take."""
    if x.device.type != "cpu":
        return None
    gate, up = module.gate_proj(x), module.up_proj(x)
    return module.down_proj(gated_silu(gate, up) if is_supported(gate, up) else module.act_fn(gate) * up)


class _Reversed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-1)
