"""Fusion of runs by weighted sums of scores or by reciprocal ranks, and the choice of weights on dev queries."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..formats.trec import Qrels, Run, expect_each_once
from ..utils.text import shorten
from .measures import evaluate

Add = Callable[[Sequence[tuple[str, float]], float, dict[str, float]], None]
LARGEST_K = 2**31 - 1
STEPS = {2: 20, 3: 10, 4: 10}  # number of runs -> steps from weight 0 to 1 that `choose_weights` tries


def fuse(runs: Sequence[Run], weights: Sequence[float] | None = None, normalization: str = "min_max") -> Run:
    """Fuse runs by a weighted sum of their scores, which are normalised within each query.

    A document that a run lacks gets that run's lowest normalised score of the query.

    Args:
        runs: query_id -> [(doc_id, score)], best first, of each system.
        weights: one for each run; None: all 1.
        normalization: "min_max" (from 0 to 1) or "z_score" (mean 0, deviation 1). A run that gives all documents of a
            query the same score gives them 0.

    Returns: a run over the union of queries and documents; equal sums are in the order of the first run.

    Raises:
        ValueError: without runs, for another number of weights, for weights that are all 0, for weights or scores that
            are not finite, and for a document that a run has twice.

    Example: c has score 0 in the first run and 1 in the second; d, which the first run lacks, has 0 in both::

        >>> from qpeft_ext.evaluation import fuse
        >>> first = {"q": [("a", 10.0), ("b", 6.0), ("c", 2.0)]}
        >>> second = {"q": [("c", 0.7), ("d", 0.2)]}
        >>> fuse([first, second], weights=[1.0, 0.25])
        {'q': [('a', 1.0), ('b', 0.5), ('c', 0.25), ('d', 0.0)]}
    """
    weights = [1.0] * len(runs) if weights is None else list(weights)
    if not runs or len(weights) != len(runs) or not np.isfinite(weights).all() or not any(weights):
        raise ValueError(
            f"fuse: expected one finite weight per run, not all 0, got {len(runs)} runs and weights {weights}"
        )
    if normalization not in ("min_max", "z_score"):
        raise ValueError(f"fuse: normalization must be min_max or z_score, got {normalization!r}")

    def add(ranking: Sequence[tuple[str, float]], weight: float, sums: dict[str, float]) -> None:
        scores = np.array([score for _, score in ranking], dtype=np.float64)
        if not np.isfinite(scores).all():
            raise ValueError("fuse: scores must be finite")
        low, spread = (scores.min(), np.ptp(scores)) if normalization == "min_max" else (scores.mean(), scores.std())
        # not the deviation, which rounding makes more than 0 where all scores are the same
        normalised = (scores - low) / spread if np.ptp(scores) > 0 else np.zeros_like(scores)
        given = dict(zip((doc_id for doc_id, _ in ranking), normalised.tolist(), strict=True))
        lowest = float(normalised.min())
        for doc_id in sums:
            sums[doc_id] += weight * given.get(doc_id, lowest)

    return _combine(runs, weights, add)


def reciprocal_rank_fusion(runs: Sequence[Run], k: int = 60, weights: Sequence[float] | None = None) -> Run:
    """Fuse runs by the sum of weight / (k + rank); a run adds nothing to a document that it lacks.

    Args:
        runs: query_id -> [(doc_id, score)], best first, of each system.
        k: from 0 to 2,147,483,647; a larger one makes the first ranks count less, until rounding makes all ranks equal.
        weights: one for each run; None: all 1.

    Returns: a run over the union of queries and documents.

    Raises:
        ValueError: without runs, for another number of weights, weights that are all 0 or not finite, another ``k``,
            and for a document that a run has twice.

    Source: Cormack et al. 2009, https://doi.org/10.1145/1571941.1572114.
    """
    weights = [1.0] * len(runs) if weights is None else list(weights)
    if not runs or len(weights) != len(runs) or not np.isfinite(weights).all() or not any(weights):
        raise ValueError(
            f"reciprocal_rank_fusion: expected one finite weight per run, not all 0, got {len(runs)} runs and weights "
            f"{weights}"
        )
    if not 0 <= k <= LARGEST_K:
        raise ValueError(f"reciprocal_rank_fusion: k must be from 0 to {LARGEST_K}, got {shorten(k)}")

    def add(ranking: Sequence[tuple[str, float]], weight: float, sums: dict[str, float]) -> None:
        for rank, (doc_id, _) in enumerate(ranking, start=1):
            sums[doc_id] += weight / (k + rank)

    return _combine(runs, weights, add)


def _combine(runs: Sequence[Run], weights: Sequence[float], add: Add) -> Run:
    """Return the documents of each query, sorted by the sums to which ``add`` adds each ranking with its weight."""
    for run in runs:
        expect_each_once(run, "fuse")
    fused: Run = {}
    for query_id in dict.fromkeys(query_id for run in runs for query_id in run):
        rankings = [run.get(query_id, []) for run in runs]
        sums = dict.fromkeys((doc_id for ranking in rankings for doc_id, _ in ranking), 0.0)
        for ranking, weight in zip(rankings, weights, strict=True):
            if ranking:
                add(ranking, weight, sums)
        fused[query_id] = sorted(sums.items(), key=lambda item: -item[1])  # stable
    return fused


def choose_weights(
    runs: Sequence[Run], qrels: Qrels, measure: str = "nDCG@10", normalization: str = "min_max"
) -> tuple[list[float], float]:
    """Choose the weights for `fuse` that are best on dev queries.

    All weights that sum to 1 are tried, in steps of 0.05 for two runs and of 0.1 for three or four. Of equally good
    ones those with the largest weight of the first run are taken: a second run must earn its place.

    Args:
        runs: 2 to 4 runs over the dev queries.
        qrels: judgements of the dev queries.
        measure: the measure that decides.
        normalization: as for `fuse`.

    Returns: the weights, and the value of the measure on the dev queries.

    Raises:
        ValueError: for another number of runs, and as `fuse` and `evaluate`.
    """
    if len(runs) not in STEPS:
        raise ValueError(f"choose_weights: expected 2 to 4 runs, got {len(runs)}; give the weights instead")
    best, best_value = [1.0], -math.inf
    for weights in _weights(len(runs), STEPS[len(runs)]):
        (value,) = evaluate(fuse(runs, weights, normalization), qrels, [measure]).means.values()
        if value > best_value + 1e-12:
            best, best_value = weights, value
    return best, best_value


def _weights(count: int, steps: int) -> Iterator[list[float]]:
    """Yield all lists of ``count`` multiples of 1 / steps that sum to 1, from the largest first weight down."""

    def rest(count: int, left: int) -> Iterator[list[int]]:
        if count == 1:
            yield [left]
            return
        for first in range(left, -1, -1):
            for others in rest(count - 1, left - first):
                yield [first, *others]

    return ([part / steps for part in parts] for parts in rest(count, steps))
