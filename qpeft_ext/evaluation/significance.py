"""Tests of whether two systems differ, and the correction for several comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .measures import _EVAL_EXTRA

TESTS = ("t-test", "permutation")
_ROUNDING = 1e-12  # share of a value that rounding may change


def paired_test(first: Mapping[str, float], second: Mapping[str, float], test: str = "t-test", seed: int = 0) -> float:
    """Compute the two-sided p-value of the paired difference between two systems over the same queries.

    Args:
        first, second: query_id -> value, for the same queries.
        test: "t-test" (as `scipy.stats.ttest_rel`), or "permutation" of the signs of the differences: all of them, or
            9,999 draws where there are more.
        seed: seed of the draws.

    Returns: p; 1.0 if no query differs, NaN with fewer than two queries.

    Raises:
        ImportError: without scipy.
        ValueError: for an unknown test, or other queries.
    """
    if test not in TESTS:
        raise ValueError(f"paired_test: test must be one of {', '.join(TESTS)}, got {test!r}")
    if first.keys() != second.keys():
        raise ValueError(
            f"paired_test: both systems need the same queries, got {len(first)} and {len(second)}, "
            f"{len(first.keys() & second.keys())} in common"
        )
    difference = changes(first, second)
    if len(difference) < 2:
        return float("nan")
    if not difference.any():
        return 1.0
    if np.ptp(difference) == 0 and test == "t-test":
        return 0.0  # no variance to test the difference against
    try:
        from scipy import stats
    except ImportError:
        raise ImportError(_EVAL_EXTRA) from None
    if test == "t-test":
        return float(stats.ttest_1samp(difference, 0.0).pvalue)  # ttest_rel is this test on the difference
    result = stats.permutation_test(
        (difference,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=9999,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def changes(first: Mapping[str, float], second: Mapping[str, float]) -> np.ndarray:
    """Compute the difference between two systems for each query, in the order of ``first``.

    Values that differ by rounding only count as equal: a mean over seeds may miss the value that all of them have by
    its last bit, and by the same bit for every query, which a test would find significant.

    Args:
        first, second: query_id -> value, for the same queries.

    Returns: float64 [queries].
    """
    values = np.array([(first[query_id], second[query_id]) for query_id in first], dtype=np.float64).reshape(-1, 2)
    difference = values[:, 0] - values[:, 1]
    difference[np.abs(difference) <= _ROUNDING * np.abs(values).max(axis=1)] = 0
    return difference


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number, as Holm (1979); a NaN is no comparison and stays NaN.

    The smallest of m is multiplied by m, the next by m − 1, and so on; none becomes smaller than one before it, or
    larger than 1.
    """
    order = sorted((place for place, p in enumerate(p_values) if p == p), key=lambda place: p_values[place])
    corrected, largest = list(p_values), 0.0
    for left, place in zip(range(len(order), 0, -1), order, strict=True):
        largest = max(largest, min(1.0, left * p_values[place]))
        corrected[place] = largest
    return corrected


def format_p(p: float) -> str:
    """Return a p-value as tables show it."""
    return "p –" if p != p else "p<.001" if p < 0.001 else f"p={p:.3f}".replace("0.", ".", 1)
