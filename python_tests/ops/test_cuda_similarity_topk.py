"""similarity_topk on CUDA against the CPU and the definition."""

import pytest
import torch
from on_cuda import assert_close, cpu, documents, operator_inputs

import qpeft_ext.ops as ops


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize(("n", "M", "T"), [(1, 1, 1), (37, 3, 5), (300, 2, 4)])
def test_similarity_reduce(run, n, M, T, norms):
    similarity = torch.randint(-3, 4, (n, M * T)).float()  # many ties
    inverse = torch.rand(n) if norms else None
    mask = torch.rand(M, T) < 0.7
    mask[-1] = False  # a query without tokens
    buffers = torch.zeros(M, n), torch.zeros(M, n, dtype=torch.int32)
    ours = run("similarity_topk_reduce", similarity, inverse, mask, *buffers, outputs=(3, 4))
    cpu.similarity_topk_reduce(similarity, inverse, mask, *buffers)
    assert_close(ours, buffers, 0)


@pytest.mark.parametrize("k", [1, 10, 400])
@pytest.mark.parametrize(("B", "S", "V"), [(1, 1, 1), (5, 37, 30), (3, 600, 500)])
def test_similarity_select(run, B, S, V, k):
    ids, mask, group = documents(B, S, V)
    rows, _, ids, slots, *_ = cpu.document_rows_distinct(ids, mask, group, 1, V)
    M, U = 3, len(rows)
    best = torch.randint(-4, 5, (M, U)).float()  # ties: the earlier token wins
    positions = torch.randint(0, 9, (M, U), dtype=torch.int32)
    best_row = torch.arange(B) % (M + 1)  # a row that is not there gives padding
    arguments = best, positions, best_row, ids, slots, k
    assert_close(run("similarity_topk_select", *arguments), cpu.similarity_topk_select(*arguments), 0)


def test_empty(run):
    best, padding = torch.empty(1, 0), torch.full((2, 3), -1)
    scores, clue_ids, _ = run(
        "similarity_topk_select", best, best.int(), torch.zeros(2, dtype=torch.long), padding, padding.int(), 2
    )
    assert scores.tolist() == [[-torch.inf] * 2] * 2 and clue_ids.tolist() == [[-1, -1]] * 2


def test_nan_traps(replica):
    """A GPU cannot report a wrong value without waiting for it: the kernel stops."""
    with pytest.raises(RuntimeError, match="similarity_topk_select: .*trap"):
        zero = torch.zeros(1, 1, dtype=torch.int32)
        replica.similarity_topk_select(torch.tensor([[torch.nan]]), zero, torch.zeros(1).long(), zero.long(), zero, 1)


@pytest.fixture
def use_replica(replica, monkeypatch):
    """The operator in Python, with the CUDA kernels below it."""
    for name in (
        "document_rows_distinct",
        "document_rows_gather",
        "similarity_topk_reduce",
        "similarity_topk_select",
    ):
        monkeypatch.setattr(cpu, name, getattr(replica, name))


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_similarity_topk_on_cuda_kernels(use_replica, metric):
    from qpeft_ext.ops.similarity_topk import reference

    inputs = operator_inputs()
    for a, b in zip(ops.similarity_topk(*inputs, 6, metric), reference(*inputs, 6, metric), strict=True):
        assert_close([a], [b])
