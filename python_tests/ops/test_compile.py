"""The operators in torch.compile: whole graphs, and the same results and gradients as without it."""

from __future__ import annotations

import pytest
import torch
from inputs import make_documents
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

from qpeft_ext.ops import clue_attention, similarity_topk, token_log_likelihood

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_graphs():
    """torch.compile without its cache, which would reuse a graph that was made for an earlier build of the library."""
    with config.patch(force_disable_caches=True):
        yield


def random_tensors(*shapes, device) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=random).to(device).requires_grad_() for shape in shapes]


def of_similarity(device):
    """Return a function of tensors that need gradients, and these."""
    x = make_documents(device=device)

    def scores(query_embeds, table):
        found = similarity_topk(*x._replace(query_embeds=query_embeds, table=table), k=4)
        return found.scores.masked_fill(found.clue_ids < 0, 0)

    return scores, [y.clone().requires_grad_() for y in (x.query_embeds, x.table)]


def of_attention(device):
    x = make_documents(device=device)
    D = x.table.shape[1]

    def clues(query_embeds, table, *weights):
        return clue_attention(*x._replace(query_embeds=query_embeds, table=table), *weights, num_heads=4)

    embeds = [y.clone().requires_grad_() for y in (x.query_embeds, x.table)]
    return clues, embeds + random_tensors(*4 * [(D, D)], *4 * [(D,)], device=device)


def of_likelihood(device):
    target_ids = torch.arange(13, device=device)
    tensors = random_tensors((13, 16), (37, 16), (37,), device=device)
    return lambda hidden, head, bias: token_log_likelihood(hidden, head, target_ids, bias, soft_cap=3.0), tensors


def gradients(results, tensors) -> tuple[torch.Tensor, ...]:
    """Return gradients to which each result adds in a way of its own."""
    results = [y for y in results if y.requires_grad]
    scales = [torch.linspace(-1, i + 1, y.numel(), device=y.device).view_as(y) for i, y in enumerate(results)]
    return torch.autograd.grad(results, tensors, scales)


@pytest.mark.parametrize("operator", [of_similarity, of_attention, of_likelihood])
def test_there_are_no_graph_breaks(operator, device):
    """Traced, with autograd, by everything but the code generator, which takes long."""
    function, tensors = operator(device)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*tensors), function(*tensors)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients([found], tensors), gradients([expected], tensors), rtol=1e-4, atol=1e-5)


def test_inductor_calls_them(device):
    """One graph with all operators and little else, since compilers take seconds for each thing that they fuse."""
    x = make_documents(device=device)
    target_ids = torch.arange(13, device=device)
    w_v = torch.eye(16, device=device).requires_grad_()

    def function(query_embeds, table, absorbed, w_v, hidden, head):
        found = similarity_topk(*x._replace(query_embeds=query_embeds, table=table), k=4)
        heads = torch.ops.qpeft_ext.clue_attention_heads(absorbed, table, *x[3:], w_v)[0]
        return *found, heads, token_log_likelihood(hidden, head, target_ids, soft_cap=3.0)

    tensors = random_tensors((3, 5, 4, 16), (13, 16), (37, 16), device=device)
    tensors = [*(y.clone().requires_grad_() for y in (x.query_embeds, x.table)), tensors[0], w_v, *tensors[1:]]
    expected = function(*tensors)
    found, code = run_and_get_code(torch.compile(function, fullgraph=True), *tensors)
    for name in ("similarity_topk", "clue_attention_heads", "token_log_likelihood"):
        assert any(f"torch.ops.qpeft_ext.{name}." in part for part in code), name
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, tensors), gradients(expected, tensors), rtol=1e-4, atol=1e-5)
