"""document_rows on CUDA against the CPU: indexing, masks, barriers."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from on_cuda import assert_close, cpu, documents

pytestmark = pytest.mark.slow


def check_distinct(run, ids, mask, group, G, V):
    rows, offsets, found, slots, counts, lengths = run("document_rows_distinct", ids, mask, group, G, V)
    truth = cpu.document_rows_distinct(ids, mask, group, G, V)
    true_rows, true_offsets, true_found, _, true_counts, true_lengths = truth
    assert torch.equal(offsets, true_offsets)
    assert len(rows) == min(ids.numel(), G * V)  # what no data can exceed
    for first, last in zip(offsets[:-1], offsets[1:], strict=True):
        assert torch.equal(rows[first:last], true_rows[first:last].sort().values)  # the order inside a group is free
    assert_close((found, counts, lengths), (true_found, true_counts, true_lengths))
    filled = found >= 0
    assert torch.equal(rows[slots[filled].long()], found[filled]) and bool((slots[~filled] == -1).all())
    slot_group = torch.searchsorted(offsets[1:], slots.long(), right=True)
    assert bool((slot_group == group[:, None])[filled].all())


@pytest.mark.parametrize(("B", "S", "V", "G"), [(1, 1, 1, 1), (5, 37, 40, 3), (4, 300, 97, 2), (3, 20, 9000, 2)])
def test_distinct(run, B, S, V, G):
    check_distinct(run, *documents(B, S, V, G), G, V)


@pytest.mark.parametrize(("S", "V"), [(2048, 3000), (2049, 70), (20_000, 20_000)])  # hashed; cells in global memory
def test_long_documents(run, S, V):
    check_distinct(run, *documents(5, S, V, 2), 2, V)  # more documents than blocks: cells are used again


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(B=st.integers(0, 6), S=st.integers(0, 90), V=st.integers(1, 400), G=st.integers(1, 4), seed=st.integers(0, 999))
def test_any_documents(run, B, S, V, G, seed):
    check_distinct(run, *documents(B, S, V, G, seed), G, V)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "D"), [(1, 1), (7, 37), (3, 600)])
def test_gather(run, dtype, n, D):
    sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    table = torch.randn(11, D).to(dtype)
    table[4] = 0
    rows = torch.tensor([10, -1, 4, 0, 10, 3, 9])[:n]
    block, norms = torch.full((n, D), torch.nan, dtype=dtype), torch.full((n,), torch.nan, dtype=sum_dtype)
    block, norms = run("document_rows_gather", table, rows, block, norms, outputs=(2, 3))
    truth = torch.where((rows < 0)[:, None], torch.zeros((), dtype=dtype), table[rows])
    length = truth.to(sum_dtype).norm(dim=1)
    assert torch.equal(block, truth)
    assert_close([norms], [torch.where(length > 0, 1 / length, 0)], 1e-6)


def test_gather_with_strides(replica):
    table, block = torch.randn(9, 16)[:, 3:10], torch.zeros(2, 12)
    replica.document_rows_gather(table, torch.tensor([8, 2]), block[:, 4:11], None)
    assert torch.equal(block[:, 4:11], table[[8, 2]])
    assert block[:, :4].count_nonzero() == block[:, 11:].count_nonzero() == 0


def test_empty(run):
    long, none = torch.empty(0, dtype=torch.long), torch.empty(0, 4, dtype=torch.long)
    rows, offsets, *_ = run("document_rows_distinct", none, none.bool(), long, 2, 7)
    assert len(rows) == 0 and offsets.tolist() == [0, 0, 0]
    run("document_rows_gather", torch.randn(3, 2), long, torch.empty(0, 2), None, outputs=(2,))


def test_wrong_values_trap(replica):
    """A GPU cannot report a wrong value without waiting for it: the kernel stops instead of reading elsewhere."""
    one = torch.ones(1, 1, dtype=torch.bool)
    for wrong in (-1, 7):
        with pytest.raises(RuntimeError, match="document_rows_distinct: .*trap"):
            replica.document_rows_distinct(torch.tensor([[wrong]]), one, torch.zeros(1).long(), 1, 7)
        with pytest.raises(RuntimeError, match="document_rows_distinct: .*trap"):
            replica.document_rows_distinct(torch.tensor([[0]]), one, torch.tensor([wrong]), 1, 7)
    for wrong in (-2, 3):
        with pytest.raises(RuntimeError, match="document_rows_gather: .*trap"):
            replica.document_rows_gather(torch.randn(3, 2), torch.tensor([wrong]), torch.empty(1, 2), None)
