"""Choose the temperature of a loss before training.

The best one is that with which the *untrained* LM has the lowest loss. At any other the optimiser can lower the loss
by merely scaling all differences of ℓ, which changes no ranking (`benchmarks/quality/NOTES.md` has what that costs).
It is kept between σ/20 and σ, where σ is the deviation of ℓ between the documents of a query, so that an LM that knows
nothing yet can learn. For distillation it is σ / σ of the teacher's scores.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from ..config import DISTILLATION, QPeftConfig
from .losses import configured_loss

AUTO = "auto"
QUERIES = 64  # that a temperature is fitted on
_SHARES = tuple(20 ** (-step / 60) for step in range(61))  # of the deviation: 1 … 1/20, in steps of 5 %


def best_temperature(config: QPeftConfig, tables: Sequence[tuple[Tensor, ...]]) -> float:
    """Find the temperature for the config's loss.

    Args:
        config: names the loss.
        tables: for each group of queries the arguments of `configured_loss` that follow the config.
    Returns: nats per query token, to two digits.
    Raises: ValueError if ℓ is not finite, or the same for all documents.
    """
    spread = _deviation([(likelihood, mask) for likelihood, _, mask, *_ in tables])
    if not 0 < spread < math.inf:
        raise ValueError(
            "temperature='auto': expected scores that differ between documents, got a deviation "
            f"of {spread}; set a number, or look at the examples and at the LM's dtype"
        )
    if config.loss in DISTILLATION:
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
