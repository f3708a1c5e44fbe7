"""Training objectives over ℓ, the mean log-likelihood of the query, in nats: per query first, then over queries.

Each takes ℓ of every candidate in a [Q, M] table, which of them are ``positive`` [Q, M] bool, and which are real
(``mask`` [Q, M] bool). A query without negatives adds nothing to a pairwise loss; one without positives is an error.
"""

from __future__ import annotations

import torch
from torch import Tensor

LISTWISE_SCALE = 10.0  # sharpens the softmax over mean log-likelihoods, which differ by tenths of a nat


def pointwise(likelihood: Tensor, positive: Tensor, mask: Tensor, margin: float = 0.0) -> Tensor:
    """mean over positives of −ℓ⁺."""
    positive = _positives(positive, mask)
    per_query = torch.where(positive, -likelihood, 0).sum(1) / positive.sum(1)
    return per_query.mean()


def pairwise(likelihood: Tensor, positive: Tensor, mask: Tensor, margin: float = 0.0) -> Tensor:
    """mean over (positive, negative) of relu(margin − ℓ⁺ + ℓ⁻)."""
    positive = _positives(positive, mask)
    pairs = positive[:, :, None] & (mask & ~positive)[:, None, :]  # [Q, M⁺, M⁻]
    hinge = torch.relu(margin - likelihood[:, :, None] + likelihood[:, None, :])
    return (torch.where(pairs, hinge, 0).sum((1, 2)) / pairs.sum((1, 2)).clamp_min(1)).mean()


def pointwise_pairwise(likelihood: Tensor, positive: Tensor, mask: Tensor, margin: float = 0.0) -> Tensor:
    """The paper's objective: `pointwise` + `pairwise`."""
    return pointwise(likelihood, positive, mask) + pairwise(likelihood, positive, mask, margin)


def listwise(likelihood: Tensor, positive: Tensor, mask: Tensor, margin: float = 0.0) -> Tensor:
    """−log of the softmax mass of the positives, of 10·ℓ."""
    positive = _positives(positive, mask)
    logits = (LISTWISE_SCALE * likelihood).masked_fill(~mask, float("-inf"))
    return (logits.logsumexp(1) - logits.masked_fill(~positive, float("-inf")).logsumexp(1)).mean()


LOSSES = {function.__name__: function for function in (pointwise, pairwise, pointwise_pairwise, listwise)}


def _positives(positive: Tensor, mask: Tensor) -> Tensor:
    positive = positive & mask
    if not positive.any(1).all():
        raise ValueError("a loss needs at least one positive document for each query")
    return positive
