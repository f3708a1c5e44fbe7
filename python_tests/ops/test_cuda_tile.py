"""Products of gathered rows (csrc/cuda/tile.cuh) against float64, in every shape of tile."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_cuda import OnReplica

pytestmark = pytest.mark.slow

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def check(replica, dtype, lengths, columns, D, V=50, end_to_end=True, squares=False, padding=0, missing=0, seed=0):
    """Compare with float64. ``padding``: elements between rows; ``missing``: columns that the last list lacks."""
    generator = torch.Generator().manual_seed(seed)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    table, dense = (
        torch.randn(n, D + padding, generator=generator).to(dtype) for n in (V, len(lengths) * columns - missing)
    )
    table[:, D:], dense[:, D:] = torch.nan, torch.nan  # not to be read
    most = max(lengths, default=0)
    rows = torch.full((sum(lengths) if end_to_end else most * len(lengths),), -1)  # -1: not to be read either
    offsets = torch.tensor([0, *lengths]).cumsum(0) if end_to_end else torch.tensor(lengths, dtype=torch.int64)
    out = torch.full((len(rows), columns), torch.nan, dtype=sums)
    truth = out.double()
    begin = 0
    for number, n in enumerate(lengths):
        begin = begin if end_to_end else number * most
        here = slice(begin, begin + n)
        rows[here] = torch.randint(0, V, (n,), generator=generator)
        x, y = table[rows[here], :D].double(), dense[number * columns : (number + 1) * columns, :D].double()
        truth[here, : len(y)] = x @ y.T
        if squares:
            widest = 16 if columns <= 16 else 64 if columns <= 64 or dtype == torch.float64 else 128
            truth[here, : len(y)] /= 1 + x.square().sum(1, keepdim=True)
            truth[here, : len(y)] += torch.arange(len(y)) // widest
        begin += n

    arguments = table, rows, offsets, dense, columns, D, end_to_end, squares, out
    (ours,) = OnReplica(replica)("tile_product", *arguments, outputs=(8,))
    rtol = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(ours.double(), truth, rtol=rtol, atol=rtol * 4 * (D + 1) ** 0.5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 16, 17, 64, 65, 128, 200])  # on both sides of every shape, and several tiles
def test_shapes(replica, columns, dtype):
    # 256: full tiles of every shape, to the last row
    check(replica, dtype, [0, 37, 1, 130, 256], columns, 72, missing=min(5, columns - 1))
    check(replica, dtype, [40, 0, 3], columns, 600, end_to_end=False, squares=True)  # more stages than fit at once


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [0, 1, 7, 31, 250, 257])
def test_any_size_of_rows(replica, D, dtype):
    check(replica, dtype, [33, 5], 20, D, squares=True)  # not aligned: 16 bytes at a time would cross rows
    check(replica, dtype, [33, 5], 20, D, padding=-D % 8 + 8, squares=True)  # aligned, with a tail


@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    lengths=st.lists(st.integers(0, 80), max_size=5),
    columns=st.integers(1, 140),
    D=st.integers(0, 130),
    end_to_end=st.booleans(),
    squares=st.booleans(),
    aligned=st.booleans(),
    seed=st.integers(0, 99),
)
def test_anything(replica, dtype, lengths, columns, D, end_to_end, squares, aligned, seed):
    padding = -D % 8 if aligned else 0
    missing = seed % columns if lengths else 0
    check(replica, dtype, lengths, columns, D, 50, end_to_end, squares, padding, missing, seed)


def test_wrong_ids_trap(replica):
    for wrong in (-1, 3):
        with pytest.raises(RuntimeError, match="trap"):
            replica.tile_product(
                torch.randn(3, 4), torch.tensor([wrong]), torch.tensor([0, 1]), torch.randn(2, 4), 2, 4, True, False,
                torch.empty(1, 2),
            )  # fmt: skip
