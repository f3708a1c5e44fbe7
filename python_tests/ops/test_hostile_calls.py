"""Operators against their definitions on hostile shapes, scales and layouts, and single cases of the same kind.

More cases: python python_tests/fuzz/operators.py --count 10000
"""

import pytest
import torch
from fuzz import operators
from hypothesis import HealthCheck, settings
from inputs import make_documents

from qpeft_ext.ops import clue_attention, similarity_topk, token_log_likelihood
from qpeft_ext.ops.token_log_likelihood import reference

pytestmark = pytest.mark.slow

some = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
test_attention = some(operators.attention)
test_topk = some(operators.topk)
test_likelihood = some(operators.likelihood)


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e5])
def test_attention_to_one_token_has_no_gradient(scale):
    """A softmax over one token is 1 whatever the score, so nothing reaches the query, the keys or w_k."""
    x = make_documents(Q=1, T=3, D=8, V=5, B=2, S=4, seed=1)
    ids = torch.tensor([[2, 2, 2, 2], [4, 4, 4, 4]])
    query, w_q, w_k, w_v, w_o = (scale**0.5 * torch.randn(rows, 8, generator=torch.Generator().manual_seed(rows))
                                 for rows in (3, 8, 9, 10, 11))  # fmt: skip
    inputs = [y.requires_grad_() for y in (query[None], w_q, w_k[:8].clone(), w_v[:8].clone())]
    y = clue_attention(inputs[0], x.query_mask | True, x.table, ids, ids >= 0, x.query_index, *inputs[1:], w_o[:8],
                       num_heads=2)  # fmt: skip
    grad_query, grad_w_q, grad_w_k, grad_w_v = torch.autograd.grad(y.sum(), inputs)
    for gradient in (grad_query, grad_w_q, grad_w_k):
        assert gradient.abs().max() <= 1e-5 * grad_w_v.abs().max()


def test_gradients_of_scores_of_thousands():
    """Two tokens have the scores 8192 and 8191, which are exact in float32: their weights are those of 1 and 0."""
    query = torch.tensor([[[8192.0, 0, 0, 0]]], requires_grad=True)
    table = torch.tensor([[2, 0.5, 0, 0], [2 - 2**-12, -0.5, 0, 0]])  # times the scale of 1 / 2
    ids, mask = torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool)
    result = clue_attention(query, mask[:, :1], table, ids, mask, ids[:, 0], *[torch.eye(4)] * 4, num_heads=1)
    gradient = torch.autograd.grad(result[0, 0, 1], query)[0]
    first, second = torch.tensor([1.0, 0.0], dtype=torch.float64).softmax(0).tolist()
    assert result[0, 0, 1].item() == pytest.approx(0.5 * (first - second), rel=1e-6)
    assert gradient[0, 0, 1].item() == pytest.approx(0.5 * first * second, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_in_a_whole_chunk_is_seen(dtype):
    hidden, lm_head = torch.randn(2, 4, dtype=dtype), torch.randn(64, 4, dtype=dtype)
    for words in (slice(0, 16), slice(48, 64), slice(0, 64)):
        spoilt = lm_head.clone()
        spoilt[words] = torch.nan
        assert token_log_likelihood(hidden, spoilt, torch.tensor([40, 50]), chunk_bytes=1).isnan().all()


@pytest.mark.parametrize("soft_cap", [1e-300, 1e-50, 1e-30, 1.0, 1e4, 1e6, 1e30, 1e300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_soft_caps_of_any_size(soft_cap, dtype):
    hidden, lm_head = torch.randn(3, 4, dtype=dtype, requires_grad=True), torch.randn(20, 4, dtype=dtype)
    targets = torch.tensor([3, 0, 19])
    ours = token_log_likelihood(hidden, lm_head, targets, soft_cap=soft_cap)
    if soft_cap <= 1e-30:  # the limit: all words are equal
        truth = torch.full((3,), 20.0, dtype=dtype).log().neg() + 0 * hidden.sum()
    else:
        inputs = (hidden.double(), lm_head.double(), targets)
        truth = reference(*inputs, soft_cap=soft_cap if soft_cap < 1e20 else None).to(dtype)
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)
    gradients = (torch.autograd.grad(y.sum(), hidden, retain_graph=True)[0] for y in (ours, truth))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["columns first", "every other", "expanded"])
def test_tables_with_any_strides(layout):
    x = make_documents()
    table = torch.ones(29, 1).expand(29, 16) if layout == "expanded" else operators.laid_out(x.table, layout)
    eye = [torch.eye(16)] * 4
    for run in (lambda t: similarity_topk(*x[:2], t, *x[3:], 3).scores,
                lambda t: clue_attention(*x[:2], t, *x[3:], *eye, num_heads=4),
                lambda t: token_log_likelihood(x.table[:5], t, torch.arange(5))):  # fmt: skip
        assert torch.equal(run(table), run(table.contiguous()))
