"""Rotary embeddings of queries and keys on CPUs, by `ops.rotary`.

An attention layer of transformers calls the function `apply_rotary_pos_emb` of its own file. During our passes this
name is another function, which is ours in the threads of the passes and theirs in all others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.rotary import is_supported, rotary
from ..utils.memory import raise_if_out_of_memory
from ..utils.torch_state import SharedSetting
from .attention import in_pass
from .errors import LM_ERRORS

NAME = "apply_rotary_pos_emb"

_found: dict[str, SharedSetting | None] = {}  # by the name of the file's module; None: it computes something else


def files_with_ours(decoder: nn.Module) -> Sequence[str]:
    """Find the files of a decoder's layers whose rotary embedding is the same as ours.

    Returns: names of modules, for `ours_in`.
    """
    files: dict[str, dict[str, Any]] = {}
    for kind in {type(module) for module in decoder.modules()}:
        own = inspect.unwrap(kind.forward)
        code, names = getattr(own, "__code__", None), getattr(own, "__globals__", {})
        if code is not None and NAME in code.co_names and NAME in names:
            files[names["__name__"]] = names
    for name, names in files.items():
        if name not in _found:
            _found[name] = _setting(names) if _is_ours(names[NAME]) else None
    return sorted(name for name in files if _found[name] is not None)


@contextmanager
def ours_in(files: Sequence[str]) -> Iterator[None]:
    """Make the rotary embedding of files that `files_with_ours` has found ours, in passes of any thread."""
    with ExitStack() as stack:
        for name in files:
            if (setting := _found[name]) is not None:
                stack.enter_context(setting.inside())
        yield


def _setting(names: dict[str, Any]) -> SharedSetting:
    return SharedSetting(lambda: names[NAME], lambda function: names.update({NAME: function}), _in_passes(names[NAME]))


def _in_passes(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(theirs)
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not in_pass() or not (is_supported(q, cos, sin) and is_supported(k, cos, sin)):
            return theirs(q, k, cos, sin, *args, **kwargs)
        return rotary(q, cos, sin), rotary(k, cos, sin)

    return apply_rotary_pos_emb


def _is_ours(theirs: Callable[..., Any]) -> bool:
    """Does a function compute `ops.rotary` of queries and keys?"""
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 3, 8, generator=random) for heads in (4, 2))
    cos, sin = (torch.randn(2, 3, 8, generator=random) for _ in range(2))
    if not is_supported(q, cos, sin):
        return False
    try:
        found = theirs(q, k, cos, sin)
    except LM_ERRORS as error:  # it takes something else
        raise_if_out_of_memory(error)
        return False
    if not isinstance(found, tuple) or len(found) != 2:
        return False
    return all(
        isinstance(x, Tensor) and x.shape == y.shape and torch.allclose(x, rotary(y, cos, sin), atol=1e-5)
        for x, y in zip(found, (q, k), strict=True)
    )
