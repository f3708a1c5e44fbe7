"""Training objectives over ℓ, the mean log-likelihood of the query, in nats: per query first, then over queries.

All take tables over Q queries and up to M documents each, and return a scalar:

    likelihood  ℓ of every document, [Q, M], floating
    positive    [Q, M] bool, True for a relevant document; a query without any is a ValueError
    mask        [Q, M] bool, False where a query has fewer than M documents: what ℓ is there never counts

A query without negatives adds nothing to a loss over pairs. Differences of ℓ are tenths of a nat; a ``temperature``
divides them, and `best_temperature` finds one for an LM.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..config import QPeftConfig


def configured_loss(
    config: QPeftConfig,
    likelihood: Tensor,
    positive: Tensor,
    mask: Tensor,
    document: Tensor | None = None,
    teacher_scores: Tensor | None = None,
) -> Tensor:
    """Compute the loss that a config names, with the config's options.

    Args:
        config: names the loss, its margin and its temperature.
        likelihood: ℓ, [Q, M].
        positive, mask: [Q, M] bool, as described above.
        document: int64 [Q, M], equal where two queries meet the same document (for "contrastive").
        teacher_scores: [Q, M], NaN where there is none (for "margin_mse" and "kl_divergence").
    Returns: a scalar.
    Raises: ValueError for a temperature that is not a number yet, or a query without positives.
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
    """Return whether the loss of a config has a temperature.

    Args:
        config: names the loss.
    """
    return "temperature" in inspect.signature(LOSSES[config.loss]).parameters


def pointwise(likelihood: Tensor, positive: Tensor, mask: Tensor) -> Tensor:
    """Compute the mean over positives of −ℓ⁺.

    Args:
        likelihood: ℓ, [Q, M].
        positive: [Q, M] bool, the relevant documents.
        mask: [Q, M] bool, False for padding.
    Returns: a scalar, in nats per query token.
    """
    likelihood, positive = _counted(likelihood, positive, mask)
    per_query = torch.where(positive, -likelihood, 0).sum(1) / positive.sum(1)
    return per_query.mean()


def pairwise(likelihood: Tensor, positive: Tensor, mask: Tensor, margin: float = 0.0) -> Tensor:
    """Compute the mean over pairs (positive, negative) of relu(margin − ℓ⁺ + ℓ⁻).

    Args:
        likelihood: ℓ, [Q, M].
        positive: [Q, M] bool, the relevant documents.
        mask: [Q, M] bool, False for padding.
        margin: how far a positive should be above a negative, in nats per query token.
    Returns: a scalar, in nats per query token.
    """
    likelihood, positive = _counted(likelihood, positive, mask)
    pairs = _pairs(positive, mask & ~positive)
    hinge = torch.relu(margin - likelihood[:, :, None] + likelihood[:, None, :])
    return (torch.where(pairs, hinge, 0).sum((1, 2)) / pairs.sum((1, 2)).clamp_min(1)).mean()


def pointwise_pairwise(likelihood: Tensor, positive: Tensor, mask: Tensor, margin: float = 0.0) -> Tensor:
    """Compute the paper's objective, `pointwise` + `pairwise`.

    Args:
        likelihood: ℓ, [Q, M].
        positive: [Q, M] bool, the relevant documents.
        mask: [Q, M] bool, False for padding.
        margin: as in `pairwise`.
    Returns: a scalar, in nats per query token.
    """
    return pointwise(likelihood, positive, mask) + pairwise(likelihood, positive, mask, margin)


def listwise(likelihood: Tensor, positive: Tensor, mask: Tensor, temperature: float = 0.1) -> Tensor:
    """Compute −log of the share of the positives in the softmax over ℓ / temperature.

    Args:
        likelihood: ℓ, [Q, M].
        positive: [Q, M] bool, the relevant documents.
        mask: [Q, M] bool, False for padding.
        temperature: in nats per query token.
    Returns: a scalar.

    Example:
        >>> import torch
        >>> from qpeft_ext import losses
        >>> likelihood = torch.tensor([[-2.0, -2.1, -2.4]])  # one query, three documents
        >>> positive = torch.tensor([[True, False, False]])
        >>> loss = losses.listwise(likelihood, positive, torch.ones_like(positive), temperature=0.1)
        >>> print(f"{loss:.4f}")  # −log(1 / (1 + e⁻¹ + e⁻⁴))
        0.3266
    """
    likelihood, positive = _counted(likelihood, positive, mask)
    logits = (likelihood / temperature).masked_fill(~mask, float("-inf"))
    return (logits.logsumexp(1) - logits.masked_fill(~positive, float("-inf")).logsumexp(1)).mean()


def contrastive(
    likelihood: Tensor, positive: Tensor, mask: Tensor, document: Tensor, temperature: float = 0.1
) -> Tensor:
    """Compute InfoNCE in both directions, half of each, for retrieval of text and code.

    A positive against the negatives of its query, and the query against the other queries that met the same document.
    Queries are unequally likely before any document is read, so ℓ is taken relative to its mean over the query's
    documents; within a query this changes nothing. A document that no other query met adds nothing to the second half.

    Args:
        likelihood: ℓ, [Q, M].
        positive: [Q, M] bool, the relevant documents.
        mask: [Q, M] bool, False for padding.
        document: int64 [Q, M], equal where two queries meet the same document.
        temperature: in nats per query token.
    Returns: a scalar.
    """
    likelihood, positive = _counted(likelihood, positive, mask)
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
    """Compute the loss of distillation: differences of scores should be those of a teacher.

    It is the mean over pairs (positive, negative) of ((ℓ⁺ − ℓ⁻) / temperature − (teacher⁺ − teacher⁻))². Documents
    without a teacher score are left out.

    Args:
        likelihood: ℓ, [Q, M].
        positive: [Q, M] bool, the relevant documents.
        mask: [Q, M] bool, False for padding.
        teacher_scores: [Q, M], NaN where there is none.
        temperature: nats per query token that are worth one of the teacher's units.
    Returns: a scalar.
    Source: Hofstätter et al. 2020, https://arxiv.org/abs/2010.02666.
    """
    likelihood, positive = _counted(likelihood, positive, mask)
    scored = mask & ~teacher_scores.isnan()
    teacher = teacher_scores.masked_fill(~scored, 0)
    pairs = _pairs(positive & scored, scored & ~positive)
    errors = (_differences(likelihood) / temperature - _differences(teacher)).square()
    return (torch.where(pairs, errors, 0).sum((1, 2)) / pairs.sum((1, 2)).clamp_min(1)).mean()


def binary_cross_entropy(likelihood: Tensor, positive: Tensor, mask: Tensor) -> Tensor:
    """Compute the mean over documents of −log σ(ℓ⁺) and −log σ(−ℓ⁻): ℓ are log-odds, and σ(ℓ) becomes a probability.

    Args:
        likelihood: ℓ, log-odds, [Q, M].
        positive: [Q, M] bool, the relevant documents.
        mask: [Q, M] bool, False for padding.
    Returns: a scalar, in nats per document.
    """
    likelihood, positive = _counted(likelihood, positive, mask)
    wrong = softplus(torch.where(positive, -likelihood, likelihood))
    return (torch.where(mask, wrong, 0).sum(1) / mask.sum(1)).mean()


def ranknet(likelihood: Tensor, positive: Tensor, mask: Tensor, temperature: float = 0.1) -> Tensor:
    """Compute the mean over pairs (positive, negative) of log(1 + exp(−(ℓ⁺ − ℓ⁻) / temperature)).

    Args:
        likelihood: ℓ, [Q, M].
        positive: [Q, M] bool, the relevant documents.
        mask: [Q, M] bool, False for padding.
        temperature: in the units of ℓ.
    Returns: a scalar.
    Source: RankNet, Burges et al. 2005, https://doi.org/10.1145/1102351.1102363.
    """
    likelihood, positive = _counted(likelihood, positive, mask)
    pairs = _pairs(positive, mask & ~positive)
    wrong = softplus(-_differences(likelihood) / temperature)
    return (torch.where(pairs, wrong, 0).sum((1, 2)) / pairs.sum((1, 2)).clamp_min(1)).mean()


def lambda_loss(likelihood: Tensor, positive: Tensor, mask: Tensor, temperature: float = 0.1) -> Tensor:
    """Compute the sum over pairs (positive, negative) of the terms of `ranknet`, weighted by what the pair is worth.

    A pair is worth the change of nDCG if the two documents changed places in the present ranking, in which equal ℓ
    have the order of the table. The ranking itself has no gradient.

    Args:
        likelihood: ℓ, [Q, M].
        positive: [Q, M] bool, the relevant documents.
        mask: [Q, M] bool, False for padding.
        temperature: in the units of ℓ.
    Returns: a scalar.
    Source: the weights of LambdaRank in the LambdaLoss of Wang et al. 2018, https://doi.org/10.1145/3269206.3271784.
    """
    likelihood, positive = _counted(likelihood, positive, mask)
    order = likelihood.detach().masked_fill(~mask, float("-inf")).argsort(dim=1, descending=True, stable=True)
    discount = 1 / torch.log2(order.argsort(dim=1) + 2.0)  # of each document's rank
    best = 1 / torch.log2(torch.arange(mask.shape[1], device=mask.device) + 2.0)
    ideal = (best.cumsum(0)[positive.sum(1) - 1])[:, None, None]
    worth = (discount[:, :, None] - discount[:, None, :]).abs() / ideal
    wrong = softplus(-_differences(likelihood) / temperature)
    return torch.where(_pairs(positive, mask & ~positive), worth * wrong, 0).sum((1, 2)).mean()


def kl_divergence(
    likelihood: Tensor, positive: Tensor, mask: Tensor, teacher_scores: Tensor, temperature: float = 0.1
) -> Tensor:
    """Compute the divergence of the softmax over ℓ / temperature from the softmax over a teacher's scores.

    Both are over the documents of a query that have a teacher score; a query with fewer than two adds nothing.

    Args:
        likelihood: ℓ, [Q, M].
        positive: [Q, M] bool, the relevant documents.
        mask: [Q, M] bool, False for padding.
        teacher_scores: [Q, M], NaN where there is none.
        temperature: units of ℓ that are worth one of the teacher's units.
    Returns: a scalar, KL(teacher ‖ ours), in nats.
    """
    likelihood, _ = _counted(likelihood, positive, mask)
    scored = mask & ~teacher_scores.isnan()
    none = torch.finfo(likelihood.dtype).min  # not −inf, which a query without teacher scores would make NaN of
    ours = (likelihood / temperature).masked_fill(~scored, none).log_softmax(1)
    teacher = teacher_scores.to(likelihood.dtype).masked_fill(~scored, none).log_softmax(1)
    return torch.where(scored, teacher.exp() * (teacher - ours), 0).sum(1).mean()


LOSSES: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        pointwise_pairwise,
        pointwise,
        pairwise,
        listwise,
        contrastive,
        binary_cross_entropy,
        ranknet,
        lambda_loss,
        margin_mse,
        kl_divergence,
    )
}


def _pairs(first: Tensor, second: Tensor) -> Tensor:
    """Return which pairs of documents are one of ``first`` and one of ``second``, both [Q, M]: bool [Q, M, M]."""
    return first[:, :, None] & second[:, None, :]


def _differences(values: Tensor) -> Tensor:
    """Return the differences of all pairs of documents, [Q, M, M]."""
    return values[:, :, None] - values[:, None, :]


def _counted(likelihood: Tensor, positive: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return likelihood and positive, both [Q, M], without what stands in padding: an infinity has NaN gradients.

    Raises: ValueError for a query without positives.
    """
    positive = positive & mask
    if not positive.any(1).all():
        raise ValueError("a loss needs at least one positive document for each query")
    return torch.where(mask, likelihood, 0), positive
