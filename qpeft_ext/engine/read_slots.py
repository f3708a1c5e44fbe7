"""The slots of a pass whose outputs are read: before scored tokens, and where an answer follows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..prompts.pairs import to_device

_ALL = slice(None)


@dataclass(frozen=True)
class ReadSlots:
    """Which outputs of the LM are read, and what each is read for.

    slots: flat indices into [B·L], ascending, each once, [R].
    targets: places in ``slots`` of those before scored tokens, [N]; None where nothing is scored.
    answers: places in ``slots`` of those that an answer follows, [B]; None where nothing is asked.
    """

    slots: Tensor
    targets: Tensor | slice | None
    answers: Tensor | slice | None

    @classmethod
    def of(cls, before_targets: np.ndarray, before_answers: np.ndarray | None, device: torch.device) -> ReadSlots:
        """Lay out the slots that are read.

        Args:
            before_targets: flat indices, ascending, [N].
            before_answers: flat indices, ascending, [B]; None where nothing is asked.
            device: where the tensors go.
        """
        if before_answers is None:
            return cls(to_device(before_targets, device), _ALL, None)
        if not len(before_targets):
            return cls(to_device(before_answers, device), None, _ALL)
        slots = np.sort(np.concatenate([before_targets, before_answers]))
        places = (np.searchsorted(slots, own) for own in (before_targets, before_answers))
        targets, answers = (to_device(own, device) for own in places)
        return cls(to_device(slots, device), targets, answers)

    def split(self, outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the rows of outputs, [R, …], before scored tokens, [N, …], and before answers, [B, …]; or None."""
        return (
            None if self.targets is None else outputs[self.targets],
            None if self.answers is None else outputs[self.answers],
        )

    def of_targets(self) -> Tensor:
        """Return the slots before scored tokens, flat indices into [B·L], [N]."""
        return self.slots[:0] if self.targets is None else self.slots[self.targets]
