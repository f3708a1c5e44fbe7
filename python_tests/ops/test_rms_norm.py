"""Root-mean-square norm on the CPU: against float64 and against transformers' own, forward and backward."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qpeft_ext.ops._library import registered
from qpeft_ext.ops.rms_norm import is_supported, reference, rms_norm

native = pytest.mark.skipif(not registered("rms_norm"), reason="the library is not loaded")
SHAPES = [(3, 50, 64), (1, 1, 16), (2, 7, 77), (400, 512), (2, 3, 5, 33), (5, 2048), (0, 8), (4, 1), (2, 0)]
CASES = [(shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)]
ERROR = {torch.float32: 1e-6, torch.bfloat16: 4e-3}  # two roundings of at most 2^-9 each; of a gradient one


def inputs(shape, dtype=torch.bfloat16):
    random = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(shape, generator=random)
    return [t.to(dtype) for t in (x, torch.randn(shape[-1], generator=random), torch.randn(shape, generator=random))]


def gradient(function, x, weight, grad):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x, weight, 1e-5), x, grad.to(function(x, weight, 1e-5).dtype))[0]


def distance(x, y):
    return float((x.double() - y.double()).norm() / y.double().norm().clamp_min(1e-9))


@native
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_it_is_the_definition(shape, dtype):
    x, weight, grad = inputs(shape, dtype)
    found, slope = rms_norm(x, weight, 1e-5), gradient(rms_norm, x, weight, grad)
    assert found.shape == x.shape and found.dtype == dtype
    assert distance(found, reference(x, weight, 1e-5)) < ERROR[dtype]
    exact = gradient(reference, x.double(), weight.double(), grad)
    assert float((slope.double() - exact).norm()) <= ERROR[dtype] / 2 * float(exact.norm()) + 1e-5


@native
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_it_is_the_norm_of_transformers(shape, dtype):
    x, weight, grad = inputs(shape, dtype)
    module = LlamaRMSNorm(shape[-1], 1e-5)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    found, expected = rms_norm(x, weight, 1e-5), module(x)
    if dtype == torch.bfloat16:  # where the order of a sum decides a rounding
        assert (found != expected).float().mean().nan_to_num() < 1e-2
    torch.testing.assert_close(found, expected, rtol=2 * ERROR[dtype], atol=0)
    exact = gradient(reference, x.double(), weight.double(), grad)
    theirs = gradient(lambda x, weight, eps: module(x), x, weight, grad)
    ours = gradient(rms_norm, x, weight, grad)
    assert (ours.double() - exact).norm() <= 1.01 * (theirs.double() - exact).norm() + 1e-5


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_threads_or_the_others(dtype):
    x, weight, _ = inputs((2000, 77), dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = rms_norm(x, weight, 1e-5)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(rms_norm(x[1500:1501], weight, 1e-5)[0], found[1500])


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_rows_of_zeros_and_nan(dtype):
    x, weight, grad = inputs((6, 40), dtype)
    wide = torch.randn(6, 100).to(dtype)
    wide[:, 7:47] = x
    assert torch.equal(rms_norm(wide[:, 7:47], weight, 1e-5), rms_norm(x, weight, 1e-5))
    assert torch.equal(gradient(rms_norm, wide[:, 7:47], weight, grad), gradient(rms_norm, x, weight, grad))
    across = x.T.contiguous().T
    assert torch.equal(rms_norm(across, weight, 1e-5), rms_norm(x, weight, 1e-5))
    assert torch.equal(gradient(rms_norm, across, weight, grad.T.contiguous().T), gradient(rms_norm, x, weight, grad))
    x[1], x[2, 3], x[3, 4] = 0, torch.nan, torch.inf
    found = rms_norm(x, weight, 1e-5)
    assert (found[1] == 0).all() and found[2].isnan().all() and found[3, 4].isnan()
    assert found[[0, 4, 5]].isfinite().all()
    for i in range(6):
        assert torch.equal(rms_norm(x[i : i + 1], weight, 1e-5)[0].nan_to_num(7), found[i].nan_to_num(7))


@pytest.mark.slow
@native
def test_compiled():
    x, weight, _ = inputs((6, 40))
    arguments = (x.requires_grad_(), weight, 1e-5)
    assert torch.library.opcheck(torch.ops.qpeft_ext.rms_norm.default, arguments).keys()


@native
def test_impossible_inputs_are_errors():
    x, weight, _ = inputs((6, 40))
    assert is_supported(x, weight)
    wrongs = [
        ((x.half(), weight), "x has the wrong dtype"),
        ((x.float(), weight), "weight has the wrong dtype"),
        ((x, weight[1:]), "weight"),
        ((x[0], weight), "x must"),
    ]
    for wrong, words in wrongs:
        assert not is_supported(*wrong)
        with pytest.raises(RuntimeError, match=f"rms_norm: .*{words}"):
            torch.ops.qpeft_ext.rms_norm(*wrong, 1e-5)
    assert not is_supported(x, weight.clone().requires_grad_())
