"""clue_attention on CUDA against the CPU and the definition."""

import pytest
import torch
from on_cuda import assert_close, cpu, operator_inputs

import qpeft_ext.ops as ops


@pytest.mark.parametrize(("P", "n", "R"), [(1, 1, 1), (3, 12, 1), (4, 37, 33), (3, 9, 64)])
def test_softmax(run, P, n, R):
    U, first = n + 3, 5
    slots = torch.stack([torch.randperm(U)[:n] for _ in range(P)]).int() + first
    slots[0, n // 2 :] = -1
    slots[-1, 0] = -1
    if P > 1:
        slots[1] = -1  # a document without tokens
    counts = torch.randint(1, 4, (P, n), dtype=torch.int32) * (slots >= 0)
    scores = 5 * torch.randn(U, R)
    (weights,) = run("clue_attention_softmax", scores, slots, counts, first)
    truth = cpu.clue_attention_softmax(scores, slots, counts, first)
    assert_close([weights], [truth], 1e-6)
    grad_weights, grad_scores = torch.randn(P, n, R), torch.randn(U, R)
    backward = truth, grad_weights, slots, first, grad_scores
    ours = run("clue_attention_softmax_backward", *backward, outputs=(1, 4))
    cpu.clue_attention_softmax_backward(*backward)
    assert_close(ours, (grad_weights, grad_scores))


def test_empty(run):
    slots = torch.empty(0, 3, dtype=torch.int32)
    assert run("clue_attention_softmax", torch.randn(2, 4), slots, slots, 0)[0].shape == (0, 3, 4)


@pytest.fixture
def use_replica(replica, monkeypatch):
    """The operator in Python, with the CUDA kernels below it."""
    for name in (
        "document_rows_distinct",
        "document_rows_gather",
        "clue_attention_softmax",
        "clue_attention_softmax_backward",
    ):
        monkeypatch.setattr(cpu, name, getattr(replica, name))


def test_clue_attention_on_cuda_kernels(use_replica):
    from qpeft_ext.ops.clue_attention import reference

    torch.manual_seed(1)
    inputs, D = operator_inputs(), 24
    weights = [torch.randn(D, D, requires_grad=True) for _ in range(4)]
    biases = [torch.randn(D, requires_grad=True) for _ in range(4)]
    results, gradients = [], []
    for function, dtype in ((ops.clue_attention, torch.float32), (reference, torch.float64)):
        query, *rest = (x.to(dtype) if x.is_floating_point() else x for x in inputs)
        query.requires_grad_()
        result = function(query, *rest, *(x.to(dtype) for x in weights + biases), num_heads=4)
        results.append(result.float())
        gradients.append(torch.autograd.grad(result.square().sum(), [query, *weights, *biases]))
    assert_close(results[:1], results[1:], 1e-4)
    for ours, truth in zip(*gradients, strict=True):
        assert (ours - truth).norm() <= 1e-4 * truth.norm() + 1e-6
