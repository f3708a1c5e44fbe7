"""Rotary tables that depend on the longest prompt in a pass: "longrope" (Phi-3) and "dynamic" scaling.

Up to some length they have one table for all prompts; beyond it there is a second one ("longrope") or one for each
length ("dynamic"), and the whole pass uses it. A prompt must be read with the table of its own length, and so must its
document.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ..utils.memory import raise_if_out_of_memory
from .errors import LM_ERRORS

_FEW = 4


@dataclass
class RotaryTables:
    """The rotary tables of an LM, and the one that each prompt is read with.

    Attributes:
        limit: the longest prompt, in tokens, that is read with the first table; None: there is only one table.
        one_per_length: whether each length beyond the limit has its own.
    """

    limit: int | None = None
    one_per_length: bool = False
    _reset: list[Callable[[], object]] = field(default_factory=list)

    def of(self, tokens: int) -> int:
        """The number of the table that a prompt of ``tokens`` tokens is read with; 0 is the first one."""
        if self.limit is None or tokens <= self.limit:
            return 0
        return tokens if self.one_per_length else 1

    def reset(self) -> None:
        """Return to the first table: "dynamic" keeps that of the longest prompt so far."""
        for table in self._reset:
            table()


@torch.no_grad()
def find_rotary_tables(decoder: nn.Module, context: int | None) -> RotaryTables:
    """Find the tables by asking the rotary modules for the first positions, in passes of different lengths.

    Args:
        decoder: the LM's.
        context: the longest prompt that is ever read; None: unlimited.
    """
    longest = (context or 1 << 20) + 1  # the last token of a prompt is not read, but counts
    found = RotaryTables()
    for table in _tables(decoder):
        first = table(_FEW)
        if first is None or _equal(table(longest), first):
            continue
        low, high = _FEW, longest  # the table of `low` tokens is the first one, that of `high` is not
        while high - low > 1:
            middle = (low + high) // 2
            table(_FEW)
            low, high = (middle, high) if _equal(table(middle), first) else (low, middle)
        table(_FEW)
        other = table(2 * high)
        table(_FEW)
        found.one_per_length |= not _equal(table(high), other)
        found.limit = low if found.limit is None else min(low, found.limit)
        found._reset.append(partial(table, _FEW))
        table(_FEW)
    return found


def _equal(first: Tensor | None, second: Tensor | None) -> bool:
    return first is not None and second is not None and torch.equal(first, second)


def _tables(decoder: nn.Module) -> list[Callable[[int], Tensor | None]]:
    """A function for every rotary module: tokens of a pass -> its output for the first positions.

    The output is None where the module cannot be asked.
    """
    tables: list[Callable[[int], Tensor | None]] = []
    for module in decoder.modules():
        asked = inspect.signature(module.forward).parameters
        buffers = [name for name, _ in module.named_buffers(recurse=False)]
        if "position_ids" not in asked or not any(name.endswith("inv_freq") for name in buffers):
            continue
        types = getattr(module, "rope_type", None)
        layer_types = list(types) if isinstance(types, dict) and "layer_type" in asked else [None]
        tables += [partial(_ask, module, layer_type) for layer_type in layer_types]
    return tables


def _ask(module: nn.Module, layer_type: str | None, tokens: int) -> Tensor | None:
    device = next(module.buffers()).device
    positions = torch.tensor([[*range(_FEW), tokens - 1]], device=device)
    try:
        given = module(torch.zeros(1, device=device), positions, *(() if layer_type is None else (layer_type,)))
    except LM_ERRORS as error:
        raise_if_out_of_memory(error)
        return None
    parts: tuple[Tensor, ...] = given if isinstance(given, tuple) else (given,)
    numbers = [torch.view_as_real(part) if part.is_complex() else part for part in parts]
    return torch.cat([part[:, :_FEW].float().flatten() for part in numbers])
