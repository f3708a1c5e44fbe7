"""Rotary tables that depend on the longest prompt that is read together: "longrope" (Phi-3) and "dynamic" scaling.

Up to some length they have one table for all prompts; beyond it another one ("longrope") or one for each length
("dynamic"), for the whole pass. A prompt must be read with the table of its own length, and so must its document.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .errors import LM_ERRORS

_FEW = 4


@dataclass
class RotaryTables:
    """Which table a prompt of an LM is read with.

    limit: the longest prompt, in tokens, that is read with the first table; None: there is only one.
    one_per_length: whether each length beyond the limit has its own.
    """

    limit: int | None = None
    one_per_length: bool = False
    _reset: list[Callable[[], object]] = field(default_factory=list)

    def of(self, tokens: int) -> int:
        """Prompts of equal numbers share a table: 0 the first one."""
        if self.limit is None or tokens <= self.limit:
            return 0
        return tokens if self.one_per_length else 1

    def reset(self) -> None:
        """Back to the first table: "dynamic" keeps that of the longest prompt so far."""
        for table in self._reset:
            table()


@torch.no_grad()
def find_rotary_tables(decoder: nn.Module, context: int | None) -> RotaryTables:
    """By what the rotary modules give for the first positions when a pass reaches up to others.

    context: the longest prompt that is ever read (None: unlimited).
    """
    longest = (context or 1 << 20) + 1  # the last token of a prompt is not read, but counts
    found = RotaryTables()
    for table in _tables(decoder):
        first = table(_FEW)
        if first is None or torch.equal(table(longest), first):
            continue
        low, high = _FEW, longest  # the table of `low` tokens is the first one, that of `high` is not
        while high - low > 1:
            middle = (low + high) // 2
            table(_FEW)
            low, high = (middle, high) if torch.equal(table(middle), first) else (low, middle)
        table(_FEW)
        other = table(2 * high)
        table(_FEW)
        found.one_per_length |= not torch.equal(table(high), other)
        found.limit = low if found.limit is None else min(low, found.limit)
        found._reset.append(lambda table=table: table(_FEW))
        table(_FEW)
    return found


def _tables(decoder: nn.Module) -> list[Callable[[int], Tensor | None]]:
    """Of every rotary module: tokens of a pass -> what it gives for the first positions (None: it cannot be asked)."""
    tables = []
    for module in decoder.modules():
        asked = inspect.signature(module.forward).parameters
        buffers = [name for name, _ in module.named_buffers(recurse=False)]
        if "position_ids" not in asked or not any(name.endswith("inv_freq") for name in buffers):
            continue
        kinds = getattr(module, "rope_type", None)
        kinds = list(kinds) if isinstance(kinds, dict) and "layer_type" in asked else [None]
        tables += [lambda tokens, module=module, kind=kind: _ask(module, tokens, kind) for kind in kinds]
    return tables


def _ask(module: nn.Module, tokens: int, layer_type: str | None) -> Tensor | None:
    device = next(module.buffers()).device
    positions = torch.tensor([[*range(_FEW), tokens - 1]], device=device)
    try:
        given = module(torch.zeros(1, device=device), positions, *(() if layer_type is None else (layer_type,)))
    except LM_ERRORS:
        return None
    parts = given if isinstance(given, tuple) else (given,)
    parts = [torch.view_as_real(part) if part.is_complex() else part for part in parts]
    return torch.cat([part[:, :_FEW].float().flatten() for part in parts])
