"""Gradients of the operators are not rounded by torch.autocast: they are those outside of it, or an error."""

import sys

import pytest
import torch
from inputs import make_documents

from qpeft_ext.ops import attention_weights, clue_attention, similarity_topk, token_log_likelihood
from qpeft_ext.ops._library import registered
from qpeft_ext.ops.gated_silu import gated_silu
from qpeft_ext.ops.int8_linear import Int8Weight, int8_linear
from qpeft_ext.ops.rms_norm import rms_norm

pytestmark = pytest.mark.skipif(not registered(), reason="the library is not loaded")


def make_cases():
    """Return for each operator with a backward of its own a function of a float32 input, and that input."""
    x, generator = make_documents(D=16), torch.Generator().manual_seed(0)
    head, w_v = (torch.randn(rows, 16, generator=generator) for rows in (40, 16))
    absorbed = torch.randn(3, 5, 2, 16, generator=generator)
    layer = Int8Weight.of(torch.randn(16, 64, generator=generator))

    def top_k(table):
        scores = similarity_topk(*x[:2], table, *x[3:], 2).scores
        return scores.masked_fill(scores == -torch.inf, 0)

    return {
        "similarity_topk": (top_k, x.table),
        "clue_attention_heads": (lambda y: torch.ops.qpeft_ext.clue_attention_heads(absorbed, y, *x[3:], w_v)[0], x[2]),
        "token_log_likelihood": (lambda y: token_log_likelihood(x.table, y, x.document_ids.flatten()[:29]), head),
        "int8_linear": (lambda y: int8_linear(y, layer), torch.randn(3, 64, generator=generator)),
        "gated_silu": (lambda y: gated_silu(y, 2 * y), x.table),
        "rms_norm": (lambda y: rms_norm(y, torch.ones(16), 1e-6), x.table),
    }


@pytest.mark.parametrize("name", make_cases())
def test_a_backward_inside_of_autocast_is_that_outside_of_it(name):
    function, x = make_cases()[name]
    gradients = []
    for inside in (False, True):
        leaf = x.clone().requires_grad_()
        loss = function(leaf)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            gradients += torch.autograd.grad(loss, leaf, torch.ones_like(loss))
    assert torch.equal(*gradients)


def make_public_cases():
    """Return the public operators, each as a function of one float32 input, and that input."""
    x, w = make_documents(D=16), torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    return {
        "clue_attention": (lambda y: clue_attention(*x[:2], y, *x[3:], w, w, w, w, num_heads=2), x.table),
        "token_log_likelihood": (lambda y: token_log_likelihood(y, y, torch.arange(len(y))), x.table),
        "similarity_topk": (lambda y: similarity_topk(*x[:2], y, *x[3:], 2).scores.relu(), x.table),
    }


@pytest.mark.parametrize("is_reference", [False, True])
@pytest.mark.parametrize("name", make_public_cases())
def test_public_operators_in_autocast(name, is_reference, monkeypatch):
    monkeypatch.setattr(sys.modules[f"qpeft_ext.ops.{name}"], "uses_reference", lambda device: is_reference)
    function, x = make_public_cases()[name]
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = function(leaf).sum()
    with torch.autocast("cpu", torch.bfloat16):
        if is_reference:
            with pytest.raises(ValueError, match=r"inside torch\.autocast, .* call it outside"):
                loss.backward(retain_graph=True)
            leaf.grad = None
        else:
            loss.backward(retain_graph=True)
    inside, leaf.grad = leaf.grad, None
    loss.backward()
    expected = torch.autograd.grad(function(leaf).sum(), leaf)[0]
    assert torch.equal(leaf.grad, expected)
    assert inside is None or torch.equal(inside, expected)


def test_weights_that_explain_a_score_are_those_outside_of_autocast():
    x, w = make_documents(D=16), torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    expected = attention_weights(*x, w, w, num_heads=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention_weights(*x, w, w, num_heads=2)
    assert torch.equal(found, expected)
