"""Scores that are answers behind a prompt: the log-odds of two sets of tokens, the logit of one, or a grade."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Answer:
    """Which tokens of the head are read behind a prompt, and how they make a score.

    Attributes:
        yes: token ids, any of which says that the document is relevant.
        no: token ids, any of which says that it is not; (): the score is the logit of ``yes`` itself.
    """

    yes: tuple[int, ...]
    no: tuple[int, ...] = ()

    def token_ids(self, device: torch.device) -> Tensor:
        """Give the tokens whose logits are read, int64 [K]."""
        return torch.tensor([*self.yes, *self.no], device=device)

    def score(self, logits: Tensor) -> Tensor:
        """Make scores, [N], of the logits of `token_ids`, [N, K]: log p(yes) − log p(no), where both are sums.

        The logarithm of the softmax's denominator cancels, so that no other row of the head is needed.
        """
        yes, no = logits.split([len(self.yes), len(self.no)], dim=-1)
        return yes.logsumexp(-1) - no.logsumexp(-1) if self.no else yes.logsumexp(-1)


@dataclass(frozen=True)
class Grades:
    """Which tokens of the head are read behind a prompt, where they are grades.

    Attributes:
        sets: for each grade from 0 on, the token ids that give it.
    """

    sets: tuple[tuple[int, ...], ...]

    def token_ids(self, device: torch.device) -> Tensor:
        """Give the tokens whose logits are read, int64 [K]."""
        return torch.tensor([i for ids in self.sets for i in ids], device=device)

    def score(self, logits: Tensor) -> Tensor:
        """Make scores, [N], of the logits of `token_ids`, [N, K]: the expected grade, of the grades' probabilities."""
        of_grades = torch.stack([own.logsumexp(-1) for own in logits.split(list(map(len, self.sets)), dim=-1)], dim=-1)
        grades = torch.arange(len(self.sets), dtype=logits.dtype, device=logits.device)
        return (of_grades.softmax(-1) * grades).sum(-1)
