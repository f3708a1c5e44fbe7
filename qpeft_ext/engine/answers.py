"""Scores that are answers: the log-odds of two sets of tokens behind a prompt, or the logit of one set."""

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
