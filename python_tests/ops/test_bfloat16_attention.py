"""Attention of bfloat16 on the CPU: against float64, in ragged sizes and with free strides, forward and backward."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from qpeft_ext.ops.bfloat16_attention import bfloat16_attention, is_supported, reference
from qpeft_ext.ops.hardware import multiplies_bfloat16_by_tiles

native = pytest.mark.skipif(not multiplies_bfloat16_by_tiles(), reason="this processor has no AMX")
SHAPES = [  # B, H, heads of keys, L, T, D
    (2, 8, 4, 13, 77, 64), (3, 4, 4, 40, 299, 64), (1, 6, 2, 1, 5, 32), (2, 4, 1, 50, 33, 128), (2, 2, 2, 70, 70, 96),
    (1, 3, 1, 43, 32, 32), (2, 1, 1, 16, 64, 256), (2, 2, 1, 64, 31, 32), (1, 1, 1, 65, 1, 32),
]  # fmt: skip


def inputs(B, H, K, L, T, D, seed=0):
    """Make inputs as in a layer: heads of the query are columns of one projection, keys are in a longer buffer."""
    random = torch.Generator().manual_seed(seed)
    query = torch.randn(B, L, H, D, generator=random).bfloat16().transpose(1, 2)
    key, value = (torch.randn(B, K, T + 3, D, generator=random).bfloat16()[:, :, 3:] for _ in range(2))
    mask = torch.rand(B, 1, L, T, generator=random) < 0.7
    mask[..., 0] = True
    return *(x.detach().requires_grad_() for x in (query, key, value)), mask


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(((x.double() - y.double()).norm() / y.double().norm()).detach())


@native
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_definition(shape, threads):
    *tensors, mask = inputs(*shape)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = bfloat16_attention(*tensors, mask, 0.3)
        grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        gradients = torch.autograd.grad(found, tensors, grad)
    finally:
        torch.set_num_threads(before)
    expected = reference(*tensors, mask, 0.3)
    assert distance(found, expected) < 3e-3  # half a unit of bfloat16 is 2^-9 of a number
    wanted = torch.autograd.grad(expected, tensors, grad.double())
    if shape[4] == 1:  # one key: its weight is 1 whatever the query is
        assert all(gradients[i].abs().max() < 1e-2 for i in (0, 1))
        gradients, wanted = gradients[2:], wanted[2:]
    for ours, exact in zip(gradients, wanted, strict=True):
        assert distance(ours, exact) < 1e-2  # what comes before is rounded, too


@native
@pytest.mark.parametrize("large", [1.0, 20.0])
def test_it_is_as_exact_as_torch(large):
    query, key, value, mask = inputs(2, 4, 4, 40, 150, 64)
    query = (query * large).detach().requires_grad_()
    exact = reference(query, key, value, mask, 0.125)
    grad = torch.randn_like(exact)
    wanted = torch.autograd.grad(exact, (query, key, value), grad)
    ours = bfloat16_attention(query, key, value, mask, 0.125)
    torchs = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.125).transpose(1, 2)
    assert distance(ours, exact) <= 1.1 * distance(torchs, exact)
    grads = [torch.autograd.grad(x, (query, key, value), grad.bfloat16()) for x in (ours, torchs)]
    for mine, theirs, right in zip(*grads, wanted, strict=True):
        assert distance(mine, right) <= 1.1 * distance(theirs, right)


@native
def test_rows_without_keys_and_what_is_masked():
    """A row without any key is 0 and has no gradient; a masked key is not read, whatever it is."""
    query, key, value, mask = inputs(2, 4, 2, 20, 50, 32)
    mask[0, 0, 3] = False
    mask[..., 7] = False
    expected = bfloat16_attention(query, key, value, mask, 0.2)
    assert (expected[0, 3] == 0).all() and expected.isfinite().all()
    wanted = torch.autograd.grad(expected.float().square().sum(), (query, key, value))
    assert (wanted[0][0, :, 3] == 0).all() and (wanted[1][:, :, 7] == 0).all() and (wanted[2][:, :, 7] == 0).all()
    with torch.no_grad():
        key[:, :, 7] = 1e30
        value[:, :, 7] = -3e38
    found = bfloat16_attention(query, key, value, mask, 0.2)
    assert torch.equal(found, expected)
    again = torch.autograd.grad(found.float().square().sum(), (query, key, value))
    assert all(torch.equal(ours, before) for ours, before in zip(again, wanted, strict=True))


def masks_of_spans(L: int, T: int) -> dict[str, torch.Tensor]:
    """Masks that leave out keys at both ends, [B, 1, L, T]: for rows, for a few rows, for a whole item."""
    row, t = torch.arange(L)[:, None] + T - L, torch.arange(T)
    causal = t <= row
    last, none = torch.zeros(L, T, dtype=torch.bool), torch.zeros(L, T, dtype=torch.bool)
    last[:, -1] = True
    none[L // 2 :, T // 3 : T // 2] = True
    return {
        "causal": causal[None, None],
        "windows": (causal & (t > row - 37))[None, None],
        "padded": torch.stack([causal & (t >= start) for start in (0, 31, 33, 100, T - 1)])[:, None],
        "last key": torch.stack([last, causal])[:, None],
        "rows without": torch.stack([none, none.flip(0)])[:, None],
    }


@native
@pytest.mark.parametrize("which", masks_of_spans(1, 1))
@pytest.mark.parametrize(("L", "T"), [(40, 170), (130, 130), (9, 129)])
def test_keys_that_no_row_sees(L, T, which):
    """Keys before the first and after the last that a row sees are left out: as the definition, and not read."""
    mask = masks_of_spans(L, T)[which]
    *tensors, _ = inputs(mask.shape[0], 4, 2, L, T, 64)
    found = bfloat16_attention(*tensors, mask, 0.2)
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    gradients = torch.autograd.grad(found, tensors, grad)
    expected = reference(*tensors, mask, 0.2)
    assert distance(found, expected) < 3e-3
    for ours, exact in zip(gradients, torch.autograd.grad(expected, tensors, grad.double()), strict=True):
        assert distance(ours, exact) < 1e-2
    unseen = ~mask.any(2).expand(-1, 2, -1)
    for x in gradients[1:]:
        assert (x[unseen] == 0).all()
    with torch.no_grad():
        tensors[1][unseen], tensors[2][unseen] = 1e30, -3e38
    assert torch.equal(bfloat16_attention(*tensors, mask, 0.2), found)


@native
def test_items_and_masks_do_not_depend_on_each_other():
    query, key, value, mask = inputs(3, 4, 2, 21, 90, 64)
    together = bfloat16_attention(query, key, value, mask, 0.2)
    for i in range(3):
        here = slice(i, i + 1)
        assert torch.equal(bfloat16_attention(query[here], key[here], value[here], mask[here], 0.2), together[here])
    long = inputs(1, 1, 1, 200, 90, 64)  # the rows of one head are those of several threads
    halves = [
        bfloat16_attention(long[0][:, :, rows], *long[1:3], long[3][:, :, rows], 0.2)
        for rows in (slice(0, 100), slice(100, 200))
    ]
    assert torch.equal(torch.cat(halves, 1), bfloat16_attention(*long, 0.2))
    one = bfloat16_attention(query, key, value, mask[:1], 0.2)
    assert torch.equal(one, bfloat16_attention(query, key, value, mask[:1].expand(3, -1, -1, -1), 0.2))
    assert torch.equal(one[:1], together[:1])
    assert torch.equal(one, bfloat16_attention(query, key, value, mask[:1].mT.contiguous().mT, 0.2))  # any stride


@native
def test_nan_is_seen():
    query, key, value, mask = inputs(2, 2, 2, 20, 50, 32)
    for which in range(3):
        tensors = [x.detach().clone() for x in (query, key, value)]
        tensors[which][0, 0, 0] = torch.nan
        out = bfloat16_attention(*tensors, mask, 0.2)
        assert out[0, 0, 0].isnan().all() and out[1].isfinite().all()


@pytest.mark.slow
@native
def test_compiled():
    *tensors, mask = inputs(2, 4, 2, 20, 50, 32)
    assert torch.library.opcheck(torch.ops.qpeft_ext.bfloat16_attention.default, (*tensors, mask, 0.2)).keys()


@native
def test_impossible_inputs_are_errors():
    query, key, value, mask = (x.detach() for x in inputs(2, 4, 2, 20, 50, 32))
    assert is_supported(query, key, value, mask)
    wrong = [
        ((query.float(), key, value, mask), "bfloat16"),
        ((query[..., :16], key[..., :16], value[..., :16], mask), "32"),
        ((query[:1], key, value, mask), "first and last size"), ((query[:, :3], key, value, mask), "divide"),
        ((query, key, value[:, :, 1:], mask), "one shape"), ((query, key, value, mask[..., 1:]), "mask"),
        ((query, key, value, mask.float()), "mask"), ((query, key, value, mask[0]), "four dimensions"),
    ]  # fmt: skip
    for tensors, words in wrong:
        with pytest.raises(RuntimeError, match=f"bfloat16_attention: .*{words}"):
            torch.ops.qpeft_ext.bfloat16_attention(*tensors, 0.2)
    assert not any(is_supported(*tensors) for tensors, words in wrong if words in ("bfloat16", "32", "divide"))
    assert not is_supported(query, key, value, None) and not is_supported(query, key, value, mask.float())
