"""The temperature that suits an LM before it is trained.

In a softmax over documents it is where the LM's own likelihoods give the lowest loss: below it the loss falls when all
differences shrink, above it when all grow, and neither ranks anything better (`benchmarks/quality/NOTES.md` has what
that costs). It is at most the deviation of ℓ between the documents of a query, so that an LM that knows nothing yet
can learn, and at least a twentieth of that. With a teacher it makes the deviations of ℓ and of the teacher's scores
equal.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from ..config import QPeftConfig
from .losses import configured_loss

AUTO = "auto"
_SHARES = tuple(20 ** (-step / 60) for step in range(61))  # of the deviation: 1 … 1/20, in steps of 5 %


def best_temperature(config: QPeftConfig, tables: Sequence[tuple[Tensor, ...]]) -> float:
    """A temperature for the config's loss, in nats per query token, to two digits.

    Args:
        tables: what `configured_loss` takes behind the config, for each group of queries.
    Raises: ValueError if ℓ is not finite, or the same for all documents.
    """
    spread = _deviation([(likelihood, mask) for likelihood, _, mask, *_ in tables])
    if not 0 < spread < math.inf:
        raise ValueError(
            "temperature='auto': expected log-likelihoods that differ between documents, got a deviation "
            f"of {spread}; set a number, or look at the examples and at the LM's dtype"
        )
    if config.loss == "margin_mse":
        teacher = _deviation([(scores, mask & ~scores.isnan()) for *_, mask, _, scores in tables])
        return _rounded(spread / teacher if teacher > 0 else spread)

    def loss(temperature: float) -> float:
        tried = dataclasses.replace(config, temperature=temperature)
        return fmean(float(configured_loss(tried, *group)) for group in tables)

    return _rounded(min((spread * share for share in _SHARES), key=loss))


def _deviation(parts: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Standard deviation within rows [Q, M] where ``mask``, pooled over all rows of all parts."""
    squares, count = 0.0, 0
    for values, mask in parts:
        values = torch.where(mask, values, 0).double()
        mean = values.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)
        squares += float((values - mean).square()[mask].sum())
        count += int(mask.sum())
    return math.sqrt(squares / count) if count else 0.0


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")
