"""Products of bfloat16 with float32 sums on the CPU: against float64, in all ragged sizes, and what uses them."""

import pytest
import torch
from inputs import to_float64
from test_token_log_likelihood import SETTINGS, gradients, make_inputs

from qpeft_ext.ops import _common, token_log_likelihood
from qpeft_ext.ops._common import multiply_rows, product_dtype
from qpeft_ext.ops.token_log_likelihood import reference

HERE = _common.has_bfloat16_products()
native = pytest.mark.skipif(not HERE, reason="this processor has neither AMX nor AMD's AVX512-BF16")
AMX = _common.registered() and torch.ops.qpeft_ext.bfloat16_instructions() == 2
no_amx = pytest.mark.skipif(not AMX, reason="this processor has no AMX")
both = pytest.mark.parametrize("tiles", [False, pytest.param(True, marks=no_amx)], ids=["AVX512-BF16", "AMX"])


def random(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@native
@both
@pytest.mark.parametrize("N", [0, 1, 5, 16, 17, 33, 48, 49, 95, 200])
@pytest.mark.parametrize("C, D", [(1, 2), (7, 0), (8, 6), (9, 66), (257, 64), (300, 130), (515, 62), (1030, 96)])
def test_products(N, C, D, tiles, threads):
    """Whole and ragged vectors of rows, tiles of words, columns and pairs; memory beside the results is not written."""
    a, b, weights = random(N, D), random(C, D, seed=1), random(N, C + 3, seed=2)[:, :C]
    out = torch.full((N + 1, C + 5), 7.0)
    torch.ops.qpeft_ext.bfloat16_products(a, b, out[:N, :C], tiles)
    torch.testing.assert_close(out[:N, :C].double(), a.double() @ b.double().T, rtol=1e-5, atol=1e-4)
    assert (out[N] == 7).all() and (out[:, C:] == 7).all()
    if tiles == AMX:
        assert torch.equal(multiply_rows(a, b), out[:N, :C])
    total = torch.randn(N + 1, D + 5, generator=torch.Generator().manual_seed(3))
    before = total.clone()
    torch.ops.qpeft_ext.bfloat16_add_product(total[:N, :D], weights, b, tiles)
    expected = before[:N, :D].double() + weights.double() @ b.double()
    torch.testing.assert_close(total[:N, :D].double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(total[N], before[N]) and torch.equal(total[:, D:], before[:, D:])


@native
@both
def test_more_rows_than_share_a_packed_block(tiles):
    a, b, weights = random(1100, 2050), random(70, 2050, seed=1), random(1100, 70, seed=2)
    out, total = torch.empty(1100, 70), torch.zeros(1100, 2050)
    torch.ops.qpeft_ext.bfloat16_products(a, b, out, tiles)
    torch.testing.assert_close(out.double(), a.double() @ b.double().T, rtol=1e-5, atol=1e-3)
    torch.ops.qpeft_ext.bfloat16_add_product(total, weights, b, tiles)
    torch.testing.assert_close(total.double(), weights.double() @ b.double(), rtol=1e-5, atol=1e-4)


@native
@both
def test_products_see_nan_and_infinity(tiles):
    a, b = random(20, 8), random(30, 8, seed=1)
    a[3, 1], b[17, 2], b[4, 0] = torch.nan, torch.inf, torch.nan
    found = torch.empty(20, 30)
    torch.ops.qpeft_ext.bfloat16_products(a, b, found, tiles)
    assert torch.equal(found.isnan(), (a.float() @ b.float().T).isnan())
    assert torch.equal(found[0, 17].isinf(), torch.tensor(True))
    total = torch.zeros(20, 8)
    torch.ops.qpeft_ext.bfloat16_add_product(total, random(20, 30, seed=2), b, tiles)
    assert total[:, 0].isnan().all() and total[:, 2].isinf().all() and total[:, 1].isfinite().all()


@native
def test_products_refuse():
    products, add = torch.ops.qpeft_ext.bfloat16_products, torch.ops.qpeft_ext.bfloat16_add_product
    a, b, out = random(4, 6), random(5, 6), torch.empty(4, 5)
    products(a.mT.contiguous().mT, b, out)  # an input is copied where its last stride is not 1; a result cannot be
    torch.testing.assert_close(out, a.float() @ b.float().T)
    for arguments, words in [
        ((a.float(), b, out), "a has the wrong dtype"),
        ((a[:, :5], b[:, :5], out), "even number"),
        ((a, b[:, :4], out), "b must have size 6"),
        ((a, b, out[:3]), "out must have size 4"),
        ((a, b, out.mT.contiguous().mT), "out must have last stride 1"),
        ((a, b, out.double()), "wrong dtype"),
    ]:
        with pytest.raises(RuntimeError, match=f"bfloat16_products: .*{words}"):
            products(*arguments)
    for arguments, words in [
        ((out, a, a), "b must have size 6"),
        ((out, a, random(6, 5).float()), "wrong dtype"),
        ((out[:, :4], a, random(6, 5)), "total must have size 5"),
    ]:
        with pytest.raises(RuntimeError, match=f"bfloat16_add_product: .*{words}"):
            add(*arguments)


@pytest.mark.parametrize("has", [False, pytest.param(True, marks=native)])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_likelihood_with_and_without(has, settings, monkeypatch):
    """Both paths on one processor: scores as exact as float32's, gradients to the rounding of bfloat16."""
    monkeypatch.setattr(_common, "has_bfloat16_products", lambda: has)
    for N, V, chunk_bytes in ((40, 301, 1 << 20), (40, 301, 9000), (3, 50, 500), (1, 1, 1)):
        x = make_inputs(N=N, V=V, dtype=torch.bfloat16)
        assert product_dtype(x.lm_head) == (torch.bfloat16 if has else torch.float32)
        exact = x._make(to_float64(x))
        found = token_log_likelihood(*x, **settings, chunk_bytes=chunk_bytes)
        torch.testing.assert_close(found.double(), reference(*exact, **settings), rtol=1e-5, atol=1e-5)
        truth = gradients(exact, reference, **settings)
        for ours, theirs in zip(gradients(x, **settings, chunk_bytes=chunk_bytes), truth, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-2, atol=1e-2)


@native
def test_gradient_of_a_confident_row():
    """With p of the target near 1 the small rest is not lost in the rounding of the probabilities."""
    x = make_inputs(N=8, D=64, V=200, bias=False, dtype=torch.bfloat16)
    hidden = (x.lm_head[x.target_ids].float() * 0.18).bfloat16().requires_grad_()
    token_log_likelihood(hidden, x.lm_head, x.target_ids).sum().backward()
    exact = hidden.detach().double().requires_grad_()
    log_p = reference(exact, x.lm_head.double(), x.target_ids)
    log_p.sum().backward()
    assert log_p.exp().min() > 0.9
    error = (hidden.grad.double() - exact.grad).norm(dim=1)
    assert (error < 0.01 * exact.grad.norm(dim=1)).all()


def test_what_cannot_be_multiplied_as_it_lies_is_upcast():
    head = random(10, 8)
    for other in (head.float(), head.half(), head[:, :7], head.mT.contiguous().mT, random(10, 7)):
        assert product_dtype(other) == torch.float32
    transposed = head.mT.contiguous().mT
    hidden, targets = random(3, 8, seed=1), torch.tensor([0, 4, 9])
    rows = hidden[:1].expand(3, -1)  # one row three times, without memory of its own
    for some, table in ((hidden, transposed), (hidden, head), (rows, head)):
        found = token_log_likelihood(some, table, targets)
        torch.testing.assert_close(found, reference(some, table, targets), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("C", [5, 16, 100])
def test_kept_probabilities_are_rounded_to_nearest(C):
    """Probabilities are not truncated, which would make every sum of them smaller; a NaN stays one."""
    chunk, targets = torch.ops.qpeft_ext.token_log_likelihood_chunk, torch.tensor([0, 1, 2])
    logits = torch.randn(3, C, generator=torch.Generator().manual_seed(0))
    logits[2, 1] = torch.nan
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, running = logits.clone(), torch.tensor([[-torch.inf], [0], [-torch.inf]]).repeat(1, 3)
        chunk(x, None, targets, 0, 1.0, None, running, torch.zeros(3, 4), dtype)
        found[dtype] = x.view(dtype)[:, :C]
    assert found[torch.float32][:2].isfinite().all()
    torch.testing.assert_close(found[torch.bfloat16], found[torch.float32].bfloat16(), rtol=0, atol=0, equal_nan=True)
