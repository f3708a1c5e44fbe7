"""Fusion of runs: weighted sums of normalised scores, reciprocal ranks, and the choice of weights on dev queries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..formats.trec import Qrels, Run
from .measures import evaluate

STEPS = {2: 20, 3: 10, 4: 10}  # number of runs -> steps from weight 0 to 1 that `choose_weights` tries


def fuse(runs: Sequence[Run], weights: Sequence[float] | None = None, normalization: str = "min_max") -> Run:
    """Weighted sum of normalised scores, query by query.

    Args:
        weights: one per run; None: all 1.
        normalization: "min_max" (0 to 1 within a query) or "z_score". A document that a run lacks gets that run's
            lowest normalised score of the query; where a run has one score for everything, all get 0.
    Returns: a run over the union of queries and documents; equal sums in the order of the first run.
    """
    weights = [1.0] * len(runs) if weights is None else list(weights)
    if not runs or len(weights) != len(runs) or not np.isfinite(weights).all():
        raise ValueError(f"fuse: expected one finite weight per run, got {len(runs)} runs and weights {weights}")
    if normalization not in ("min_max", "z_score"):
        raise ValueError(f"fuse: normalization must be min_max or z_score, got {normalization!r}")

    def add(ranking: Sequence[tuple[str, float]], weight: float, sums: dict[str, float]) -> None:
        scores = np.array([score for _, score in ranking], dtype=np.float64)
        if not np.isfinite(scores).all():
            raise ValueError("fuse: scores must be finite")
        low, spread = (scores.min(), np.ptp(scores)) if normalization == "min_max" else (scores.mean(), scores.std())
        normalised = (scores - low) / spread if spread > 0 else np.zeros_like(scores)
        given = dict(zip((doc_id for doc_id, _ in ranking), normalised.tolist(), strict=True))
        lowest = float(normalised.min())
        for doc_id in sums:
            sums[doc_id] += weight * given.get(doc_id, lowest)

    return _combine(runs, weights, add)


def reciprocal_rank_fusion(runs: Sequence[Run], k: int = 60, weights: Sequence[float] | None = None) -> Run:
    """Sum of weight / (k + rank) over the runs (Cormack et al. 2009); a run gives nothing to a document it lacks."""
    weights = [1.0] * len(runs) if weights is None else list(weights)
    if not runs or len(weights) != len(runs) or k < 0:
        raise ValueError(
            f"reciprocal_rank_fusion: expected one weight per run and k >= 0, got {len(runs)} runs, "
            f"weights {weights}, k {k}"
        )

    def add(ranking: Sequence[tuple[str, float]], weight: float, sums: dict[str, float]) -> None:
        for rank, (doc_id, _) in enumerate(ranking, start=1):
            sums[doc_id] += weight / (k + rank)

    return _combine(runs, weights, add)


def _combine(runs: Sequence[Run], weights: Sequence[float], add) -> Run:
    """Per query: ``add`` each ranking to the sums of all its documents, then sort."""
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
    """The weights for `fuse` that are best on these (dev) queries, and the measure they reach there.

    All weights that sum to 1 are tried in steps of 0.05 for two runs and 0.1 for three or four. Of equally good ones
    the largest weight of the first run wins: a second run must earn its place.

    Raises: ValueError for another number of runs, and as `fuse` and `evaluate`.
    """
    if len(runs) not in STEPS:
        raise ValueError(f"choose_weights: expected 2 to 4 runs, got {len(runs)}; give the weights instead")
    best: tuple[float, list[float]] | None = None
    for weights in _weights(len(runs), STEPS[len(runs)]):
        (value,) = evaluate(fuse(runs, weights, normalization), qrels, [measure]).means.values()
        if best is None or value > best[0] + 1e-12:
            best = value, weights
    return best[1], best[0]


def _weights(count: int, steps: int) -> Iterator[list[float]]:
    """Every list of ``count`` multiples of 1 / steps that sums to 1, the largest first weight first."""

    def rest(count: int, left: int) -> Iterator[list[int]]:
        if count == 1:
            yield [left]
            return
        for first in range(left, -1, -1):
            for others in rest(count - 1, left - first):
                yield [first, *others]

    return ([part / steps for part in parts] for parts in rest(count, steps))
