"""Losses against numbers worked out by hand."""

import math

import pytest
import torch

from qpeft_ext.losses import LOSSES, listwise, pairwise, pointwise, pointwise_pairwise

#           positive, negative, positive, padding | positive, negative, negative, negative
LIKELIHOOD = torch.tensor([[-1.0, -2.0, -3.0, 99.0], [-2.0, -1.5, -4.0, -1.0]])
POSITIVE = torch.tensor([[True, False, True, True], [True, False, False, False]])
MASK = torch.tensor([[True, True, True, False], [True, True, True, True]])


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


@pytest.mark.parametrize("loss", LOSSES.values())
def test_padding_has_no_influence_and_no_gradient(loss):
    likelihood = LIKELIHOOD.clone().requires_grad_()
    value = loss(likelihood, POSITIVE, MASK)
    value.backward()
    assert likelihood.grad[0, 3] == 0 and torch.isfinite(likelihood.grad).all()
    moved = LIKELIHOOD.clone()
    moved[0, 3] = -50
    assert float(loss(moved, POSITIVE, MASK)) == float(value)


def test_a_query_without_negatives_adds_nothing_to_the_pairwise_loss():
    alone = pairwise(LIKELIHOOD[:1], torch.ones(1, 4, dtype=torch.bool), MASK[:1])
    assert float(alone) == 0


@pytest.mark.parametrize("loss", LOSSES.values())
def test_a_query_without_positives_is_an_error(loss):
    with pytest.raises(ValueError, match="at least one positive"):
        loss(LIKELIHOOD, torch.zeros_like(POSITIVE), MASK)
