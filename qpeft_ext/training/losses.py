"""Training objectives over ℓ, the mean log-likelihood of the query, in nats: per query first, then over queries.

Each takes ℓ of every candidate in a [Q, M] table, which of them are ``positive`` [Q, M] bool, and which are real
(``mask`` [Q, M] bool). A query without negatives adds nothing to a pairwise loss; one without positives is an error.
The ``temperature`` is what differences of ℓ, tenths of a nat, are divided by; `best_temperature` finds one for an LM.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from ..config import QPeftConfig


def configured_loss(
    config: QPeftConfig,
    likelihood: Tensor,
    positive: Tensor,
    mask: Tensor,
    document: Tensor | None = None,
    teacher_scores: Tensor | None = None,
) -> Tensor:
    """The loss that a config names, with its options; a scalar.

    Args:
        likelihood: ℓ, [Q, M].  positive, mask: [Q, M] bool.
        document: int64 [Q, M], equal where two queries meet the same document (for "contrastive").
        teacher_scores: [Q, M], NaN where there is none (for "margin_mse").
    """
    options = {"margin": config.margin, "temperature": config.temperature, "document": document,
               "teacher_scores": teacher_scores}  # fmt: skip
    loss = LOSSES[config.loss]
    if config.temperature == "auto" and needs_temperature(config):
        raise ValueError(
            f"loss={config.loss!r} needs a number for its temperature: 'auto' is for QPeftTrainer, which "
            "finds one before it trains"
        )
    named = {name: options[name] for name in inspect.signature(loss).parameters if name in options}
    return loss(likelihood, positive, mask, **named)


def needs_temperature(config: QPeftConfig) -> bool:
    return "temperature" in inspect.signature(LOSSES[config.loss]).parameters


def pointwise(likelihood: Tensor, positive: Tensor, mask: Tensor) -> Tensor:
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


def listwise(likelihood: Tensor, positive: Tensor, mask: Tensor, temperature: float = 0.1) -> Tensor:
    """−log of the softmax mass of the positives, of ℓ / temperature."""
    positive = _positives(positive, mask)
    logits = (likelihood / temperature).masked_fill(~mask, float("-inf"))
    return (logits.logsumexp(1) - logits.masked_fill(~positive, float("-inf")).logsumexp(1)).mean()


def contrastive(
    likelihood: Tensor, positive: Tensor, mask: Tensor, document: Tensor, temperature: float = 0.1
) -> Tensor:
    """InfoNCE in both directions, for retrieval of text and code: half of each.

    A positive against the negatives of its query, and the query against the other queries that met the same document.
    Queries are unequally likely before any document is read, so ℓ is taken relative to its mean over the query's
    documents; within a query this changes nothing. A document that no other query met adds nothing to the second half.
    """
    positive = _positives(positive, mask)
    prior = likelihood.masked_fill(~mask, 0).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    logits = (likelihood - prior) / temperature
    none = torch.tensor(float("-inf"), dtype=logits.dtype, device=logits.device)
    negatives = torch.where(mask & ~positive, logits, none)
    of_query = torch.logaddexp(logits, negatives.logsumexp(1, keepdim=True)) - logits  # [Q, M]
    same = document.flatten()[:, None] == document.flatten()  # [Q·M, Q·M]
    others = torch.where(same & (mask & ~positive).flatten(), logits.flatten(), none)
    of_document = torch.logaddexp(logits, others.logsumexp(1).view_as(logits)) - logits
    per_query = torch.where(positive, of_query + of_document, 0).sum(1) / positive.sum(1)
    return per_query.mean() / 2


def margin_mse(
    likelihood: Tensor, positive: Tensor, mask: Tensor, teacher_scores: Tensor, temperature: float = 0.1
) -> Tensor:
    """Distillation: mean over (positive, negative) of ((ℓ⁺ − ℓ⁻) / temperature − (teacher⁺ − teacher⁻))².

    Documents without a teacher score are left out.
    """
    positive = _positives(positive, mask)
    scored = mask & ~teacher_scores.isnan()
    teacher = teacher_scores.masked_fill(~scored, 0)
    pairs = (positive & scored)[:, :, None] & (scored & ~positive)[:, None, :]
    margins = (likelihood[:, :, None] - likelihood[:, None, :]) / temperature
    errors = (margins - (teacher[:, :, None] - teacher[:, None, :])).square()
    return (torch.where(pairs, errors, 0).sum((1, 2)) / pairs.sum((1, 2)).clamp_min(1)).mean()


LOSSES = {
    function.__name__: function
    for function in (pointwise_pairwise, pointwise, pairwise, listwise, contrastive, margin_mse)
}


def _positives(positive: Tensor, mask: Tensor) -> Tensor:
    positive = positive & mask
    if not positive.any(1).all():
        raise ValueError("a loss needs at least one positive document for each query")
    return positive
