"""The weight of `score="both"`: how much the log-odds of an answer count beside the likelihood of the query."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layers import Float32Module

START = 0.1


class MixedScore(Float32Module):
    """ℓ + w · log-odds, where ℓ is the mean log-likelihood of the query, and w is trained.

    w is 0.1 at the start, so that an LM that has not learned to answer ranks nearly as by the likelihood alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(START))

    def forward(self, mean_log_likelihood: Tensor, log_odds: Tensor) -> Tensor:
        """Compute the scores of B pairs, float32 [B].

        Args:
            mean_log_likelihood: ℓ, nats per query token, [B].
            log_odds: of the answer, nats, [B].
        """
        return mean_log_likelihood + self.weight * log_odds
