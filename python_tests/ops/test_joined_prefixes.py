"""Stored prefixes and suffixes in one tensor: against the definition, and the gradient of the suffixes."""

import pytest
import torch

from qpeft_ext.ops._library import registered
from qpeft_ext.ops.joined_prefixes import is_supported, joined_prefixes, reference

native = pytest.mark.skipif(not registered("joined_prefixes"), reason="the library is not loaded")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def inputs(dtype=torch.float32, lengths=(5, 0, 9), rows=(2, 0, 0, 1), L=3, slots=9):
    random = torch.Generator().manual_seed(0)
    prefixes = [torch.randn(1, 2, P, 7, generator=random).to(dtype) for P in lengths]
    return prefixes, list(rows), torch.randn(len(rows), 2, L, 7, generator=random).to(dtype), slots


@native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lengths", "rows", "L", "slots"), [
    ((5, 0, 9), (2, 0, 0, 1), 3, 9), ((4,), (0,), 1, 11), ((0,), (0, 0), 2, 0), ((300, 200), (1, 0, 1), 40, 300),
    ((3,), (), 2, 3), ((6, 2), (0, 1), 0, 6),
])  # fmt: skip
def test_it_is_the_definition(lengths, rows, L, slots, dtype):
    given = inputs(dtype, lengths, rows, L, slots)
    found = joined_prefixes(*given)
    assert found.shape == (len(rows), 2, slots + L, 7) and found.dtype == dtype and found.is_contiguous()
    assert torch.equal(found, reference(*given))


@native
def test_suffixes_may_have_other_strides():
    prefixes, rows, suffixes, slots = inputs()
    for other in (suffixes.transpose(1, 2).contiguous().transpose(1, 2), suffixes.mT.contiguous().mT):
        assert torch.equal(joined_prefixes(prefixes, rows, other, slots), reference(prefixes, rows, suffixes, slots))


@native
def test_the_gradient_reaches_the_suffixes():
    prefixes, rows, suffixes, slots = inputs()
    weight = torch.randn(len(rows), 2, slots + suffixes.shape[2], 7, generator=torch.Generator().manual_seed(1))
    suffixes.requires_grad_()
    (found,) = torch.autograd.grad((joined_prefixes(prefixes, rows, suffixes, slots) * weight).sum(), suffixes)
    assert torch.equal(found, weight[:, :, slots:])


@pytest.mark.slow
@native
def test_compiled():
    prefixes, rows, suffixes, slots = inputs()
    arguments = (prefixes, rows, suffixes.requires_grad_(), slots)
    assert torch.library.opcheck(torch.ops.qpeft_ext.joined_prefixes.default, arguments).keys()


@native
def test_impossible_inputs_are_errors():
    prefixes, rows, suffixes, slots = inputs()
    assert is_supported(prefixes, suffixes)
    assert not is_supported([*prefixes, prefixes[0].double()], suffixes)
    assert not is_supported([prefixes[0].mT.contiguous().mT], suffixes)
    assert not is_supported([prefixes[0].clone().requires_grad_()], suffixes)
    for wrong, words in [
        ((prefixes, [2, 0, 0, 3], suffixes, slots), "rows must be below 3, got 3"),
        ((prefixes, [2, 0, 0, -1], suffixes, slots), "rows must be below 3, got -1"),
        ((prefixes, rows[:3], suffixes, slots), "rows must have 4 numbers, got 3"),
        ((prefixes, rows, suffixes, 8), "each prefix must be contiguous"),
        ((prefixes, rows, suffixes, -1), "slots must not be negative"),
        (([p[..., :6] for p in prefixes], rows, suffixes, slots), "each prefix must be contiguous"),
        ((prefixes, rows, suffixes[0], slots), "suffixes must have 4 dimensions"),
        ((prefixes, rows, suffixes.half(), slots), "a prefix has the wrong dtype"),
    ]:
        with pytest.raises(RuntimeError, match=f"joined_prefixes: {words}"):
            joined_prefixes(*wrong)
