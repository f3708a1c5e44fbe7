"""Gradients of the operators do not depend on whether they are asked for inside of torch.autocast."""

import pytest
import torch
from inputs import make_documents

from qpeft_ext.ops import similarity_topk, token_log_likelihood
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
