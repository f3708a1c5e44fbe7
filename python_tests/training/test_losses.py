"""Losses against numbers worked out by hand."""

import math

import pytest
import torch

from qpeft_ext import QPeftConfig
from qpeft_ext.config import DISTILLATION
from qpeft_ext.training.losses import (
    LOSSES,
    binary_cross_entropy,
    configured_loss,
    contrastive,
    kl_divergence,
    lambda_loss,
    listwise,
    margin_mse,
    pairwise,
    pointwise,
    pointwise_pairwise,
    ranknet,
)

#           positive, negative, positive, padding | positive, negative, negative, negative
LIKELIHOOD = torch.tensor([[-1.0, -2.0, -3.0, 99.0], [-2.0, -1.5, -4.0, -1.0]])
POSITIVE = torch.tensor([[True, False, True, True], [True, False, False, False]])
MASK = torch.tensor([[True, True, True, False], [True, True, True, True]])
DOCUMENT = torch.tensor([[0, 1, 2, 9], [3, 0, 2, 4]])  # the queries share two of them
TEACHER = torch.tensor([[5.0, 2.0, math.nan, 7.0], [9.0, 8.0, math.nan, 1.0]])


def total(loss: str, likelihood, positive=POSITIVE, mask=MASK):
    """The loss as training calls it."""
    score = "yes_no" if loss == "binary_cross_entropy" else "likelihood"
    config = QPeftConfig(loss=loss, score=score, in_batch_negatives=loss not in DISTILLATION, temperature=0.1)
    return configured_loss(config, likelihood, positive, mask, DOCUMENT, TEACHER)


def test_pointwise():
    assert float(pointwise(LIKELIHOOD, POSITIVE, MASK)) == pytest.approx(((1 + 3) / 2 + 2) / 2)


def test_pairwise():
    first = (max(0, 0.5 + 1 - 2) + max(0, 0.5 + 3 - 2)) / 2
    second = (max(0, 0.5 + 2 - 1.5) + max(0, 0.5 + 2 - 4) + max(0, 0.5 + 2 - 1)) / 3
    assert float(pairwise(LIKELIHOOD, POSITIVE, MASK, 0.5)) == pytest.approx((first + second) / 2)


def test_the_papers_loss_is_their_sum():
    total = pointwise(LIKELIHOOD, POSITIVE, MASK) + pairwise(LIKELIHOOD, POSITIVE, MASK, 0.3)
    assert float(pointwise_pairwise(LIKELIHOOD, POSITIVE, MASK, 0.3)) == pytest.approx(float(total))


def test_listwise():
    def minus_log_mass(positives, everything):
        return -math.log(sum(math.exp(10 * x) for x in positives) / sum(math.exp(10 * x) for x in everything))

    expected = (minus_log_mass([-1, -3], [-1, -2, -3]) + minus_log_mass([-2], [-2, -1.5, -4, -1])) / 2
    assert float(listwise(LIKELIHOOD, POSITIVE, MASK)) == pytest.approx(expected)


def test_contrastive():
    def nce(own, others):
        return -math.log(math.exp(own) / (math.exp(own) + sum(math.exp(x) for x in others)))

    first = [(x + 2) / 0.5 for x in (-1, -2, -3)]  # relative to the mean over the query's documents
    second = [(x + 8.5 / 4) / 0.5 for x in (-2, -1.5, -4, -1)]
    of_query = (nce(first[0], [first[1]]) + nce(first[2], [first[1]])) / 2, nce(second[0], second[1:])
    # documents 0 and 2, positive for the first query, were met by the second as well; its document 3 by no other
    of_document = (nce(first[0], [second[1]]) + nce(first[2], [second[2]])) / 2, 0
    expected = sum(of_query + of_document) / 2 / 2
    assert float(contrastive(LIKELIHOOD, POSITIVE, MASK, DOCUMENT, 0.5)) == pytest.approx(expected)
    # a document that is positive for both queries is no negative of either
    both = POSITIVE | (DOCUMENT == 0)
    of_query = of_query[0], (nce(second[0], second[2:]) + nce(second[1], second[2:])) / 2
    of_document = (0 + nce(first[2], [second[2]])) / 2, 0
    expected = sum(of_query + of_document) / 2 / 2
    assert float(contrastive(LIKELIHOOD, both, MASK, DOCUMENT, 0.5)) == pytest.approx(expected)


def test_margin_mse():
    first = ((-1 + 2) / 0.5 - (5 - 2)) ** 2  # its other positive has no score
    second = (((-2 + 1.5) / 0.5 - (9 - 8)) ** 2 + ((-2 + 1) / 0.5 - (9 - 1)) ** 2) / 2
    assert float(margin_mse(LIKELIHOOD, POSITIVE, MASK, TEACHER, 0.5)) == pytest.approx((first + second) / 2)


def logistic(x):
    """log(1 + exp(x)), what a pair or a document costs that is x too high."""
    return math.log(1 + math.exp(x))


def test_binary_cross_entropy():
    first = (logistic(1) + logistic(-2) + logistic(3)) / 3
    second = (logistic(2) + logistic(-1.5) + logistic(-4) + logistic(-1)) / 4
    assert float(binary_cross_entropy(LIKELIHOOD, POSITIVE, MASK)) == pytest.approx((first + second) / 2)


def test_ranknet():
    first = (logistic((-2 + 1) / 0.5) + logistic((-2 + 3) / 0.5)) / 2
    second = (logistic((-1.5 + 2) / 0.5) + logistic((-4 + 2) / 0.5) + logistic((-1 + 2) / 0.5)) / 3
    assert float(ranknet(LIKELIHOOD, POSITIVE, MASK, 0.5)) == pytest.approx((first + second) / 2)


def test_lambda_loss():
    one, two, three, four = 1, 1 / math.log2(3), 0.5, 1 / math.log2(5)  # discounts of the ranks
    # ranks of the first query: 1, 2, 3, with two positives; of the second: 3, 2, 4, 1
    first = ((one - two) * logistic((-2 + 1) / 0.5) + (two - three) * logistic((-2 + 3) / 0.5)) / (one + two)
    second = (two - three) * logistic((-1.5 + 2) / 0.5) + (three - four) * logistic((-4 + 2) / 0.5)
    second += (one - three) * logistic((-1 + 2) / 0.5)
    assert float(lambda_loss(LIKELIHOOD, POSITIVE, MASK, 0.5)) == pytest.approx((first + second) / 2)


def test_kl_divergence():
    def softmax(*values):
        return [math.exp(x) / sum(map(math.exp, values)) for x in values]

    def divergence(teacher, ours):
        return sum(p * math.log(p / q) for p, q in zip(softmax(*teacher), softmax(*ours), strict=True))

    first = divergence([5, 2], [-1 / 0.5, -2 / 0.5])  # documents without a score are left out
    second = divergence([9, 8, 1], [-2 / 0.5, -1.5 / 0.5, -1 / 0.5])
    loss = kl_divergence(LIKELIHOOD, POSITIVE, MASK, TEACHER, 0.5)
    assert float(loss) == pytest.approx((first + second) / 2)
    untaught = kl_divergence(LIKELIHOOD.requires_grad_(), POSITIVE, MASK, torch.full_like(TEACHER, math.nan))
    gradient = torch.autograd.grad(untaught, LIKELIHOOD)[0]
    LIKELIHOOD.requires_grad_(False)
    assert float(untaught.detach()) == 0 and not gradient.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_padding_has_no_influence_and_no_gradient(loss):
    likelihood = LIKELIHOOD.clone().requires_grad_()
    value = total(loss, likelihood)
    value.backward()
    assert likelihood.grad[0, 3] == 0 and torch.isfinite(likelihood.grad).all()
    moved = LIKELIHOOD.clone()
    moved[0, 3] = -50
    assert float(total(loss, moved)) == float(value.detach())


@pytest.mark.parametrize("padding", [-math.inf, math.inf, math.nan])
@pytest.mark.parametrize("loss", LOSSES)
def test_padding_that_is_no_finite_number_has_no_influence_either(loss, padding):
    plain, padded = (LIKELIHOOD.double().where(MASK, other).requires_grad_() for other in (0.0, padding))
    values = [total(loss, likelihood) for likelihood in (plain, padded)]
    expected, found = (torch.autograd.grad(*pair)[0] for pair in zip(values, (plain, padded), strict=True))
    assert values[0] == values[1] and torch.equal(found, expected) and not found[0, 3]


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_finite_differences(loss):
    likelihood, step, found = LIKELIHOOD.double().requires_grad_(), 1e-6, []
    for place in range(LIKELIHOOD.numel()):
        change = torch.zeros(LIKELIHOOD.numel(), dtype=torch.double)
        change[place] = step
        change = change.view_as(LIKELIHOOD)
        found.append((total(loss, likelihood + change) - total(loss, likelihood - change)).item() / (2 * step))
    (grad,) = torch.autograd.grad(total(loss, likelihood), likelihood)
    assert grad.flatten().tolist() == pytest.approx(found, rel=1e-5, abs=1e-6)


def test_a_query_without_negatives_adds_nothing_to_the_pairwise_loss():
    alone = pairwise(LIKELIHOOD[:1], torch.ones(1, 4, dtype=torch.bool), MASK[:1])
    assert float(alone) == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_a_query_without_positives_is_an_error(loss):
    with pytest.raises(ValueError, match="at least one positive"):
        total(loss, LIKELIHOOD, torch.zeros_like(POSITIVE))


def test_the_config_gives_the_options():
    config = QPeftConfig(loss="pairwise", margin=0.5)
    assert configured_loss(config, LIKELIHOOD, POSITIVE, MASK) == pairwise(LIKELIHOOD, POSITIVE, MASK, 0.5)
    config = QPeftConfig(loss="listwise", temperature=2.0)
    assert configured_loss(config, LIKELIHOOD, POSITIVE, MASK) == listwise(LIKELIHOOD, POSITIVE, MASK, 2.0)


@pytest.mark.parametrize("options, message", [
    ({"loss": "contrastive", "in_batch_negatives": False}, "loss='contrastive' compares the queries and documents of"),
    ({"loss": "contrastive", "queries_per_group": 1}, "set in_batch_negatives=True and queries_per_group to 2 or more"),
    ({"loss": "margin_mse"}, "set in_batch_negatives=False and num_random_negatives=0"),
    ({"loss": "kl_divergence"}, "loss='kl_divergence' learns from teacher scores, which"),
    ({"loss": "binary_cross_entropy"}, "loss='binary_cross_entropy' is of log-odds; set score='yes_no', got score="),
    ({"loss": "binary_cross_entropy", "score": "both"}, "set score='yes_no', got score='both'"),
    ({"loss": "pointwise", "score": "yes_no"}, "loss='pointwise' makes queries likely, which score='yes_no' is not"),
    ({"temperature": 0.0}, "temperature must be 'auto' or above 0, got 0.0"),
    ({"temperature": "automatic"}, "temperature must be 'auto' or a number above 0, got 'automatic'"),
    ({"num_random_negatives": -1}, "num_random_negatives must be at least 0, got -1"),
])  # fmt: skip
def test_options_that_contradict_each_other(options, message):
    with pytest.raises((ValueError, TypeError)) as error:
        QPeftConfig(**options)
    assert message in str(error.value)
