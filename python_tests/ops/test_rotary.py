"""Rotary embedding on the CPU: against float64 and against transformers' own, forward and backward."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from qpeft_ext.ops._library import registered
from qpeft_ext.ops.rotary import is_supported, reference, rotary

native = pytest.mark.skipif(not registered("rotary"), reason="the library is not loaded")
CASES = [(shape, dtype) for shape in [(2, 3, 5, 64), (1, 1, 1, 2), (2, 2, 7, 6), (1, 2, 40, 160), (0, 2, 3, 8)]
         for dtype in (torch.float32, torch.bfloat16)]  # fmt: skip
ERROR = {torch.float32: 1e-6, torch.bfloat16: 8e-3}


def inputs(shape, dtype, tables=None):
    random = torch.Generator().manual_seed(0)
    B, H, L, D = shape
    x, grad = (torch.randn(shape, generator=random).to(dtype) for _ in range(2))
    cos, sin = (torch.randn(tables or B, L, D, generator=random).to(dtype) for _ in range(2))
    return x, cos, sin, grad


def gradient(function, x, cos, sin, grad):
    x = x.detach().requires_grad_()
    out = function(x, cos, sin)
    return torch.autograd.grad(out, x, grad.to(out.dtype))[0]


@native
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_it_is_the_definition(shape, dtype):
    x, cos, sin, grad = inputs(shape, dtype)
    found, exact = rotary(x, cos, sin), reference(x, cos, sin)
    assert found.dtype == dtype and found.is_contiguous()
    assert float((found.double() - exact).norm()) <= ERROR[dtype] * float(exact.norm())
    theirs, _ = apply_rotary_pos_emb(x, x, cos, sin)
    torch.testing.assert_close(found, theirs, rtol=ERROR[dtype], atol=ERROR[dtype])
    slope = gradient(rotary, x, cos, sin, grad)
    of_exact = gradient(reference, x.double(), cos, sin, grad)
    assert float((slope.double() - of_exact).norm()) <= ERROR[dtype] * float(of_exact.norm())


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_one_table_and_tokens_alone(dtype):
    x, cos, sin, grad = inputs((3, 4, 6, 10), dtype, tables=1)
    found = rotary(x, cos, sin)
    assert torch.equal(found, rotary(x, cos.expand(3, -1, -1), sin.expand(3, -1, -1)))
    projected = x.transpose(1, 2).contiguous().transpose(1, 2)  # as it comes from a linear layer
    assert torch.equal(rotary(projected, cos, sin), found)
    one = gradient(rotary, projected, cos, sin, grad.transpose(2, 3).contiguous().transpose(2, 3))
    assert torch.equal(one, gradient(rotary, x, cos, sin, grad))
    assert torch.equal(rotary(x[1:2, :, 2:3], cos[:, 2:3], sin[:, 2:3]), found[1:2, :, 2:3])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        large = inputs((3, 4, 200, 64), dtype)
        whole = rotary(*large[:3])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(rotary(large[0][1:2], large[1][1:2], large[2][1:2]), whole[1:2])


@pytest.mark.slow
@native
def test_compiled():
    x, cos, sin, _ = inputs((2, 3, 4, 8), torch.float32)
    for inverse in (False, True):
        arguments = (x.requires_grad_(), cos, sin, inverse)
        assert torch.library.opcheck(torch.ops.qpeft_ext.rotary.default, arguments).keys()


@native
def test_impossible_inputs_are_errors():
    x, cos, sin, _ = inputs((2, 3, 4, 8), torch.float32)
    assert is_supported(x, cos, sin)
    for wrong, words in [
        ((x.half(), cos.half(), sin.half()), "x has the wrong dtype"),
        ((x[..., :7], cos[..., :7], sin[..., :7]), "x must be"),
        ((x.transpose(2, 3), cos.transpose(1, 2), sin.transpose(1, 2)), "x must be"),
        ((x, cos[0], sin[0]), "cos must be"),
        ((x, cos[:, 1:], sin[:, 1:]), "cos must have size 4"),
        ((x, cos, sin[:1]), "sin must have size 2"),
        ((x, cos.bfloat16(), sin.bfloat16()), "cos has the wrong dtype"),
    ]:
        assert not is_supported(*wrong)
        with pytest.raises(RuntimeError, match=f"rotary: {words}"):
            torch.ops.qpeft_ext.rotary(*wrong)
    assert not is_supported(x, cos.clone().requires_grad_(), sin)
