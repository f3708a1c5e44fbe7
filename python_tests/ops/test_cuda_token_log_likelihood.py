"""token_log_likelihood on CUDA against the CPU and the definition."""

import pytest
import torch
from on_cuda import assert_close, cpu

import qpeft_ext.ops as ops


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(("bias", "soft_cap"), [(False, None), (True, None), (True, 3.0)])
@pytest.mark.parametrize("sizes", [[1], [37, 5], [300, 513]])
def test_likelihood_chunks(run, sizes, bias, soft_cap, keep):
    N, V, scale = 5, sum(sizes), 0.7
    logits, words = 4 * torch.randn(N, V), torch.randn(V) if bias else None
    if len(sizes) > 1:
        logits[2, : sizes[0]] = -torch.inf  # a first chunk without a possible word
    targets = torch.tensor([0, V - 1, V - 1, V // 2, 0])
    ours = torch.tensor([-torch.inf, 0, -torch.inf, 0])[:, None].repeat(1, N)
    truth = ours.clone()
    for first, C in zip([0, sizes[0]], sizes, strict=False):
        here = slice(first, first + C)
        rest = None if words is None else words[here], targets, first, scale, soft_cap
        x = logits[:, here].contiguous()
        y, ours = run("token_log_likelihood_chunk", x, *rest, ours, keep, outputs=(0, 6))
        cpu.token_log_likelihood_chunk(x, *rest, truth, keep)
        assert_close([ours], [truth])
        if keep:
            assert_close([y], [x])
    lse, grad = ours[0] + ours[1].log(), torch.tensor([1.0, -2.0, 0.5, 0.0, 1.0])
    x = logits[:, :C].contiguous()
    rest = None if words is None else words[:C], targets, 0, scale, soft_cap, lse, grad
    (y,) = run("token_log_likelihood_chunk_backward", x, *rest, outputs=(0,))
    cpu.token_log_likelihood_chunk_backward(x, *rest)
    assert_close([y], [x])


def test_empty(run):
    chunk = torch.empty(3, 0), None, torch.zeros(3).long(), 0, 1.0, None, torch.zeros(4, 3), False
    assert run("token_log_likelihood_chunk", *chunk, outputs=(6,))[0].count_nonzero() == 0


@pytest.fixture
def use_replica(replica, monkeypatch):
    """The operator in Python, with the CUDA kernels below it."""
    for name in ("token_log_likelihood_chunk", "token_log_likelihood_chunk_backward"):
        monkeypatch.setattr(cpu, name, getattr(replica, name))


def test_token_log_likelihood_on_cuda_kernels(use_replica):
    from qpeft_ext.ops.token_log_likelihood import reference

    hidden, lm_head, targets = torch.randn(9, 16), torch.randn(70, 16), torch.randint(0, 70, (9,))
    results = []
    for function in (ops.token_log_likelihood, reference):
        x, w = hidden.clone().requires_grad_(), lm_head.clone().requires_grad_()
        log_p = function(x, w, targets, torch.ones(70), 20.0, 0.5, chunk_bytes=2000)
        results.append((log_p, *torch.autograd.grad(log_p.sum(), (x, w))))
    assert_close(*results)
