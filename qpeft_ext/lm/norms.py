"""Root-mean-square norms of an LM's layers, in the engine's passes: bfloat16 on CPUs by `ops.bfloat16_rms_norm`.

As transformers' LlamaRMSNorm and its many namesakes compute it; whoever adds 1 to the weight or rounds elsewhere, keeps
its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import get_ident

import torch
from torch import Tensor, nn

from ..ops.bfloat16_rms_norm import bfloat16_rms_norm, is_supported


class LMNorms:
    """Modules whose ``forward`` becomes ours in the thread that enters `active`; none: nothing happens.

    One that has been given a forward of its own since (a hook of accelerate's) keeps it.
    """

    def __init__(self, modules: Sequence[nn.Module] = ()) -> None:
        self.modules = list(modules)

    @contextmanager
    def active(self) -> Iterator[None]:
        replaced = [module for module in self.modules if "forward" not in vars(module)]
        for module in replaced:
            vars(module)["forward"] = partial(_forward, module, _eps(module), get_ident())
        try:
            yield
        finally:
            for module in replaced:
                del vars(module)["forward"]


def find_norms(decoder: nn.Module) -> LMNorms:
    """The norms of an LM that are a root-mean-square norm of bfloat16: tried on two rows each."""
    return LMNorms([module for module in decoder.modules() if _is_rms_norm(module)])


def _is_rms_norm(module: nn.Module) -> bool:
    weight, eps = getattr(module, "weight", None), _eps(module)
    if eps is None or [name for name, _ in module.named_parameters()] != ["weight"] or "forward" in vars(module):
        return False
    if weight.dim() != 1 or not is_supported(weight.new_empty(2, len(weight)), weight.detach()):
        return False
    x = torch.linspace(-2, 2, 2 * len(weight)).view(2, -1).to(weight.dtype)
    try:
        expected = module(x)
    except (RuntimeError, TypeError, ValueError):  # it reads more than rows
        return False
    same = isinstance(expected, Tensor) and expected.shape == x.shape and expected.dtype == x.dtype
    return same and torch.allclose(bfloat16_rms_norm(x, weight.detach(), eps).float(), expected.float(), 1e-2, 1e-6)


def _eps(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps"):
        if isinstance(value := getattr(module, name, None), float):
            return value
    return None


def _forward(module: nn.Module, eps: float, thread: int, x: Tensor, *args, **kwargs) -> Tensor:
    if args or kwargs or get_ident() != thread or not is_supported(x, module.weight):
        return type(module).forward(module, x, *args, **kwargs)
    return bfloat16_rms_norm(x, module.weight, eps)
