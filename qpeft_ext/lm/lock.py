"""Several threads around one LM.

Passes take turns (`lm_lock`), and what a pass sets in the LM for its time, hooks and faster functions, does nothing in
other threads (`in_this_thread`): a thread that calls the LM itself meanwhile, ``lm.generate`` say, gets what it always
gets.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident

import torch
from torch import nn


def without_wrappers(lm: nn.Module) -> nn.Module:
    """The LM inside a `torch.compile`d one or a `peft` model, whose modules are the LM's own."""
    lm = getattr(lm, "_orig_mod", lm)
    return lm.get_base_model() if hasattr(lm, "get_base_model") else lm


def in_this_thread(hook: Callable) -> Callable:
    """A hook of a module that changes nothing in other threads than the one that registers it."""
    owner = get_ident()

    def guarded(*args):
        if torch.compiler.is_compiling() or get_ident() == owner:
            return hook(*args)
        return None

    return guarded
