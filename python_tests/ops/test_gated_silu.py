"""silu(gate) * up on the CPU: against float64 and against torch's, forward and backward."""

import pytest
import torch

from qpeft_ext.ops._library import registered
from qpeft_ext.ops.gated_silu import gated_silu, is_supported, reference

native = pytest.mark.skipif(not registered("gated_silu"), reason="the library is not loaded")
CASES = [(shape, dtype) for shape in [(3, 5, 64), (1, 1), (2, 77), (300, 200), (0, 8), (2, 0)]
         for dtype in (torch.float32, torch.bfloat16)]  # fmt: skip
ERROR = {torch.float32: 1e-6, torch.bfloat16: 4e-3}  # two roundings of at most 2^-9 each


def inputs(shape, dtype):
    random = torch.Generator().manual_seed(0)
    gate, up, grad = (torch.randn(shape, generator=random) for _ in range(3))
    return [t.to(dtype) for t in (5 * gate, up, grad)]


def gradients(function, gate, up, grad):
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    out = function(gate, up)
    return torch.autograd.grad(out, (gate, up), grad.to(out.dtype))


def theirs(gate, up):
    return torch.nn.functional.silu(gate) * up


@native
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_it_is_the_definition(shape, dtype):
    gate, up, grad = inputs(shape, dtype)
    found, exact = gated_silu(gate, up), reference(gate, up)
    assert found.shape == gate.shape and found.dtype == dtype
    assert float((found.double() - exact).norm()) <= ERROR[dtype] * float(exact.norm())
    slopes = gradients(gated_silu, gate, up, grad)
    for slope, of_exact, of_torch in zip(
        slopes, gradients(reference, gate.double(), up.double(), grad), gradients(theirs, gate, up, grad), strict=True
    ):
        own = float((slope.double() - of_exact).norm())
        assert own <= ERROR[dtype] * float(of_exact.norm())
        assert own <= 1.01 * float((of_torch.double() - of_exact).norm()) + 1e-5


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_torch_s_with_large_numbers_nan_and_other_strides(dtype):
    gate, up, _ = inputs((4, 150), dtype)
    gate[0] = torch.linspace(-120, 120, 150).to(dtype)
    gate[1, 3], gate[1, 4], up[1, 5], up[2, 6] = torch.nan, torch.inf, torch.nan, torch.inf
    found, expected = gated_silu(gate, up), theirs(gate, up)
    torch.testing.assert_close(found, expected, rtol=2 * ERROR[dtype], atol=1e-30, equal_nan=True)
    across = gate.T.contiguous().T
    assert torch.equal(gated_silu(across, up).nan_to_num(7), found.nan_to_num(7))
    for i in range(4):
        assert torch.equal(gated_silu(gate[i : i + 1], up[i : i + 1])[0].nan_to_num(7), found[i].nan_to_num(7))


@pytest.mark.slow
@native
def test_compiled():
    gate, up, _ = inputs((6, 40), torch.float32)
    arguments = (gate.requires_grad_(), up.requires_grad_())
    assert torch.library.opcheck(torch.ops.qpeft_ext.gated_silu.default, arguments).keys()


@native
def test_impossible_inputs_are_errors():
    gate, up, _ = inputs((6, 40), torch.float32)
    assert is_supported(gate, up)
    for wrong, words in [
        ((gate.half(), up.half()), "gate has the wrong dtype"),
        ((gate, up.bfloat16()), "up has the wrong dtype"),
        ((gate, up[:3]), "up must have size 6"),
        ((gate[0], up[0]), "gate must have 2 dimensions"),
    ]:
        assert not is_supported(*wrong)
        with pytest.raises(RuntimeError, match=f"gated_silu: {words}"):
            torch.ops.qpeft_ext.gated_silu(*wrong)
