"""Root-mean-square norms of bfloat16 on CPUs, by `ops.bfloat16_rms_norm`.

Only modules that compute exactly what transformers' LlamaRMSNorm computes are replaced; variants (Gemma's weight + 1,
other places of rounding) keep their own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import get_ident
from typing import cast

from torch import Tensor, nn

from ..ops.bfloat16_rms_norm import bfloat16_rms_norm, is_supported


def may_be_ours(module: nn.Module) -> bool:
    """Does the module look like a root-mean-square norm that we have a faster form of?"""
    weight = getattr(module, "weight", None)
    if _eps(module) is None or "forward" in vars(module) or not isinstance(weight, Tensor) or weight.dim() != 1:
        return False
    if [name for name, _ in module.named_parameters()] != ["weight"]:
        return False
    return is_supported(weight.new_empty(2, len(weight)), weight.detach())


def forward_in_thread(module: nn.Module, thread: int) -> Callable[..., Tensor]:
    """A ``forward`` for the norm that is ours in one thread and the module's own in all others.

    Raises: TypeError for a module that `may_be_ours` does not take.
    """
    eps = _eps(module)
    if eps is None:
        raise TypeError(f"expected a root-mean-square norm, got a {type(module).__name__}")
    return partial(_forward, module, eps, thread)


def _eps(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps"):
        if isinstance(value := getattr(module, name, None), float):
            return value
    return None


def _forward(module: nn.Module, eps: float, thread: int, x: Tensor, *args, **kwargs) -> Tensor:
    weight = cast(Tensor, module.weight)
    if args or kwargs or get_ident() != thread or not is_supported(x, weight):
        return type(module).forward(module, x, *args, **kwargs)
    return bfloat16_rms_norm(x, weight, eps)
