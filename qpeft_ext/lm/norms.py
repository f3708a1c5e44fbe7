"""Root-mean-square norms on CPUs, by `ops.rms_norm`.

Only modules that compute exactly what transformers' LlamaRMSNorm computes are replaced; variants (Gemma's weight + 1,
other places of rounding) keep their own forward.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from ..ops.rms_norm import is_supported, rms_norm


def may_be_ours(module: nn.Module) -> bool:
    """Does the module look like a root-mean-square norm that we have a faster form of?"""
    weight = getattr(module, "weight", None)
    if _eps(module) is None or "forward" in vars(module) or not isinstance(weight, Tensor) or weight.dim() != 1:
        return False
    if [name for name, _ in module.named_parameters()] != ["weight"]:
        return False
    return is_supported(weight.new_empty(2, len(weight)), weight.detach())


def forward(module: nn.Module, x: Tensor) -> Tensor | None:
    """Compute the norm of a module that `may_be_ours` takes; None for an input that ours does not take."""
    eps, weight = _eps(module), cast(Tensor, module.weight)
    return rms_norm(x, weight, eps) if eps is not None and is_supported(x, weight) else None


def _eps(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps"):
        if isinstance(value := getattr(module, name, None), float):
            return value
    return None
