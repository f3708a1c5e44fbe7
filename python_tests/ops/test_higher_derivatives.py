"""Derivatives that there are not raise an error: second ones, those of torch.func, and those of some inputs."""

import pytest
import torch
from inputs import make_documents
from torch.autograd import functional

from qpeft_ext.ops import ProjectedTable, _library, clue_attention, similarity_topk, token_log_likelihood
from qpeft_ext.ops.bfloat16_attention import bfloat16_attention
from qpeft_ext.ops.causal_attention import causal_attention
from qpeft_ext.ops.joined_prefixes import joined_prefixes
from qpeft_ext.ops.rms_norm import rms_norm
from qpeft_ext.ops.rotary import rotary
from qpeft_ext.ops.similarity_topk import reference


def make_cases():
    """Return for each name a loss and the input by which it is differentiated."""
    x = make_documents(Q=2, T=3, D=4, V=9, B=3, S=4, dtype=torch.float64)
    documents, generator = x[3:], torch.Generator().manual_seed(0)
    hidden, lm_head, w_q, w_k, w_v, w_o = (
        torch.randn(rows, 4, generator=generator, dtype=torch.float64) for rows in (5, 7, 4, 4, 4, 4)
    )
    targets = torch.arange(5)

    def top_k(query, table):
        scores = similarity_topk(query, x.query_mask, table, *documents, 2).scores
        return scores.masked_fill(scores == -torch.inf, 0).square().sum()

    def attend(query, table, w_v):
        return clue_attention(query, x.query_mask, table, *documents, w_q, w_k, w_v, w_o, num_heads=2).square().sum()

    return {
        "likelihood of hidden": (lambda y: token_log_likelihood(y, lm_head, targets).square().sum(), hidden),
        "likelihood of lm_head": (lambda y: token_log_likelihood(hidden, y, targets).square().sum(), lm_head),
        "a linear loss": (lambda y: token_log_likelihood(y, lm_head, targets).sum(), hidden),
        "top_k of the query": (lambda y: top_k(y, x.table), x.query_embeds),
        "top_k of the table": (lambda y: top_k(x.query_embeds, y), x.table),
        "attention of the query": (lambda y: attend(y, x.table, w_v), x.query_embeds),
        "attention of the table": (lambda y: attend(x.query_embeds, y, w_v), x.table),
        "attention of w_v": (lambda y: attend(x.query_embeds, x.table, y), w_v),
    }


CASES = make_cases()


def penalised(loss, x):
    """Return a loss with a gradient penalty; without an error the penalty would silently have no gradient."""
    x = x.clone().requires_grad_()
    gradient = torch.autograd.grad(loss(x), x, create_graph=True)[0]
    return torch.autograd.grad(gradient.square().sum() + x.pow(3).sum(), x)


@pytest.mark.parametrize("second", [penalised, functional.hessian], ids=["penalty", "hessian"])
@pytest.mark.parametrize("case", CASES)
def test_second_derivatives_are_an_error(case, second):
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        second(*CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_a_graph_that_nobody_differentiates_costs_nothing(case):
    loss, x = CASES[case]
    x = x.clone().requires_grad_()
    first, again = (torch.autograd.grad(loss(x), x, create_graph=create)[0] for create in (False, True))
    assert torch.equal(first, again.detach())


@pytest.mark.parametrize("case", CASES)
def test_forward_mode_is_an_error(case):
    loss, x = CASES[case]
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(loss, (x,), (torch.ones_like(x),))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jacfwd(loss)(x)


@pytest.mark.parametrize("case", CASES)
def test_transforms_of_torch_func_that_differentiate_are_an_error(case):
    loss, x = CASES[case]
    two = torch.stack([x, x + 1])
    calls = [
        lambda: torch.func.grad(loss)(x),
        lambda: torch.func.vjp(loss, x),
        lambda: torch.func.jacrev(loss)(x),
        lambda: torch.func.vmap(torch.func.grad(loss))(two),
        lambda: torch.func.grad(lambda y: torch.func.vmap(loss)(y).sum())(two),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match="no derivative by torch.func; use backward"):
            call()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("case", CASES)
def test_vmap_computes_values_and_gradients(case):
    loss, x = CASES[case]
    two = torch.stack([x, x + 1]).requires_grad_()
    mapped, one_by_one = torch.func.vmap(loss)(two), torch.stack([loss(y) for y in two])
    torch.testing.assert_close(mapped, one_by_one)
    gradients = (torch.autograd.grad(losses.sum(), two)[0] for losses in (mapped, one_by_one))
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(torch.func.vmap(loss)(two.detach()), one_by_one.detach())


@pytest.mark.parametrize("case", CASES)
def test_vmap_over_the_definitions(case, monkeypatch):
    """With QPEFT_REFERENCE=1 the definitions run in plain PyTorch, and checks of inputs read their values."""
    monkeypatch.setattr(_library, "REFERENCE", True)
    monkeypatch.setattr(_library, "_live", {})
    test_vmap_computes_values_and_gradients(case)


def test_vmap_over_every_input_of_the_definition():
    torch.manual_seed(0)
    x = torch.randn(3, 2, 4, 8), torch.rand(3, 2, 4) > 0.3, torch.randn(3, 9, 8), torch.randint(0, 9, (3, 5, 6))
    x[1][:, :, 0] = True
    documents = torch.rand(3, 5, 6) > 0.2, torch.randint(0, 2, (3, 5))

    def found(*inputs):
        return tuple(reference(*inputs, k=4))

    one_by_one = [found(*row) for row in zip(*x, *documents, strict=True)]
    for name, mapped, alone in zip("scores ids positions".split(), torch.func.vmap(found)(*x, *documents),
                                   zip(*one_by_one, strict=True), strict=True):  # fmt: skip
        torch.testing.assert_close(mapped, torch.stack(alone), msg=name)
    wrong = [y.clone() for y in (*x, *documents)]
    wrong[3][1, 2, 3], wrong[4][1, 2, 3] = 9, True
    with pytest.raises(IndexError, match=r"an id of document_ids is outside \[0, V\) = \[0, 9\)"):
        torch.func.vmap(found)(*wrong)
    wrong = [y.clone() for y in (*x, *documents)]
    wrong[1][2, 1] = False
    with pytest.raises(ValueError, match="every query needs a token"):
        torch.func.vmap(found)(*wrong)
    wrong = [y.clone() for y in (*x, *documents)]
    wrong[2][0] = torch.nan
    with pytest.raises(ValueError, match="a similarity is NaN"):
        torch.func.vmap(found)(*wrong)


def test_an_input_that_is_constant_in_a_transform_is_none_to_differentiate():
    loss, x = CASES["likelihood of hidden"]
    found = torch.func.grad(lambda y: (y * loss(x)).sum())(torch.ones(3, dtype=x.dtype))
    torch.testing.assert_close(found, loss(x).expand(3))


def test_forward_mode_is_an_error_where_there_is_no_gradient_at_all():
    x, eye = make_documents(D=16), torch.eye(16)
    store = ProjectedTable(x.table, eye, eye, budget_bytes=1 << 20)
    low = torch.randn(1, 2, 3, 32, dtype=torch.bfloat16)
    calls = [
        lambda y: store.attend(y, x.query_mask, *x[3:], eye, eye, num_heads=2),
        lambda y: bfloat16_attention(y.bfloat16(), low, low, torch.ones(1, 1, 3, 3, dtype=torch.bool), 1.0),
        lambda y: rms_norm(y.bfloat16(), torch.ones(16, dtype=torch.bfloat16), 1e-6),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(call, (x.query_embeds,), (x.query_embeds,))


@pytest.mark.parametrize(("call", "name"), [
    (lambda y: rms_norm(torch.ones(2, 16), y[0, 0, 0], 1e-6), "weight"),
    (lambda y: rotary(torch.ones(1, 2, 3, 16), y[0], y[0].detach()), "cos"),
    (lambda y: rotary(torch.ones(1, 2, 3, 16), y[0].detach(), y[0]), "sin"),
    (lambda y: joined_prefixes([y.detach(), y], [0, 1], torch.ones(2, 1, 3, 16), 3), r"prefixes\[1\]"),
    (lambda y: causal_attention(y, y.detach(), y.detach(), [0], 1.0), "query"),
    (lambda y: causal_attention(y.detach(), y, y.detach(), [0], 1.0), "key"),
    (lambda y: causal_attention(y.detach(), y.detach(), y, [0], 1.0), "value"),
])  # fmt: skip
def test_an_input_that_would_get_no_gradient_is_an_error(call, name):
    asks = torch.ones(1, 1, 3, 16, requires_grad=True)
    with pytest.raises(ValueError, match=f"{name} gets no gradient"):
        call(asks)
    with torch.no_grad():
        assert call(asks).isfinite().all()
    assert call(asks.detach()).isfinite().all()
