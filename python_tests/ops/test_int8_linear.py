"""Linear layers in 8 bits: against sums of integers, the kernels against each other, gradients, and wrong inputs."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from qpeft_ext.ops._library import registered
from qpeft_ext.ops.int8_linear import Int8Weight, int8_linear, reference, turn

native = pytest.mark.skipif(not registered(), reason="the library is not loaded")
SHAPES = [
    (1, 64, 16),
    (5, 64, 48),
    (12, 128, 32),
    (33, 576, 192),
    (97, 192, 80),
    (700, 64, 16),
    (31, 1536, 64),
    (700, 1536, 32),  # two blocks of rows
    (0, 64, 16),
]
NAMES = ("portable", "AVX512-VNNI", "AMX")


def kernels():
    """The kernels that this processor has: those that it has not would be another one's."""
    return range(int(torch.ops.qpeft_ext.int8_instructions()) + 1) if registered() else []


def inputs(N, D, C, with_bias=True):
    random = torch.Generator().manual_seed(N + D + C)
    x, weight = 3 * torch.randn(N, D, generator=random), torch.randn(C, D, generator=random)
    x[:, D // 2] *= 20  # an outlier in every row, which is not rounded, and one that is
    x[:, 7] *= 10
    layer = Int8Weight.of(weight, (D // 2, 3, D - 1) if D > 64 else ())
    return x, layer, torch.randn(C, generator=random) if with_bias else None, weight


def turned(x):
    """H x for each 64 neighbours, in float32: sums and differences of pairs, in the order of the kernels."""
    x = x.reshape(-1, 64).copy()
    for distance in (16, 32, 1, 2, 4, 8):
        first = np.flatnonzero(~np.arange(64) & distance)
        x[:, first], x[:, first + distance] = x[:, first] + x[:, first + distance], x[:, first] - x[:, first + distance]
    return x


def by_integers(x, layer, bias):
    """The layer in NumPy. Returns what it gives, in float64."""
    weights, columns = layer.rounded.numpy().astype(np.int64), layer.columns.numpy()
    x = x.numpy().copy()
    apart = x[:, columns].astype(np.float64)
    x[:, columns] = 0
    x = turned(x).reshape(x.shape)
    largest = np.abs(x).max(1, keepdims=True)
    whole = np.rint(x * (np.float32(127) / largest)).astype(np.int64)  # float32 decides where two steps are as near
    out = (whole @ weights.T) * (largest / np.float32(127)).astype(np.float64) * layer.scale.numpy()
    out += apart @ layer.exact.numpy()
    return torch.from_numpy(out if bias is None else out + bias.numpy())


def call(x, layer, bias, kernel):
    return torch.ops.qpeft_ext.int8_linear(x, *layer, bias, kernel)


@native
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", kernels(), ids=[NAMES[kernel] for kernel in kernels()])
def test_it_is_the_sum_of_integers(kernel, shape, with_bias):
    x, layer, bias, _ = inputs(*shape, with_bias)
    found, expected = call(x, layer, bias, kernel), by_integers(x, layer, bias)
    assert found.shape == expected.shape and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=2e-4)  # of sums of up to 3,000


@native
@pytest.mark.parametrize("kernel", kernels(), ids=[NAMES[kernel] for kernel in kernels()])
def test_extreme_integers_do_not_overflow(kernel):
    x, weight = torch.zeros(2, 1536), torch.zeros(16, 1536)
    x[0, ::64], x[1, ::64] = 1, -1  # turned: 1 or -1 everywhere
    weight[:8, ::64], weight[8:, ::64] = 1, -1
    found = call(x, Int8Weight.of(weight), None, kernel)
    torch.testing.assert_close(found, x @ weight.T)  # 1536 sums of 127 * 127, of either sign


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_definition(shape):
    x, layer, bias, weight = inputs(*shape)
    found, exact = reference(x, layer, bias), torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    ours = int8_linear(x, layer, bias)
    if not len(x):
        assert ours.shape == found.shape
        return
    assert (ours - found).norm() <= 2e-3 * found.norm()  # float32 and float64 round a few numbers of x differently
    assert 1e-4 < (ours - exact).norm() / exact.norm() < 0.02  # it is rounded, and no worse than 8 bits are


@native
def test_a_row_does_not_depend_on_the_others():
    x, layer, bias, _ = inputs(97, 192, 80)
    for kernel in kernels():
        together = call(x, layer, bias, kernel)
        for i in (0, 13, 95, 96):
            assert torch.equal(call(x[i : i + 1], layer, bias, kernel)[0], together[i])
        assert torch.equal(call(x.flip(0), layer, bias, kernel).flip(0), together)


@native
def test_threads_change_no_bit():
    x, layer, bias, _ = inputs(700, 576, 320)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(int8_linear(x, layer, bias))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@native
def test_strides_rows_of_zeros_tiny_and_not_finite_numbers():
    x, layer, bias, weight = inputs(6, 64, 32)
    wide = torch.randn(6, 100)
    wide[:, 7:71] = x
    assert torch.equal(int8_linear(wide[:, 7:71], layer, bias), int8_linear(x, layer, bias))
    assert torch.equal(int8_linear(x.T.contiguous().T, layer, bias), int8_linear(x, layer, bias))
    x[0], x[1], x[2, 3], x[3, 4] = 0, 1e-43, torch.nan, -torch.inf
    for kernel in kernels():
        found = call(x, layer, bias, kernel)
        assert torch.equal(found[0], bias) and torch.equal(found[1], bias)
        assert not found[[2, 3]].isfinite().any() and found[4:].isfinite().all()


def test_the_weight_is_rounded_to_the_nearest_step():
    weight = torch.zeros(32, 128)
    weight[0, 0], weight[1, 65], weight[3, 5], weight[3, 70] = 1.27, -0.5, 2, 33
    layer = Int8Weight.of(weight, [70])
    assert layer.columns.tolist() == [70] and layer.exact[0, :4].tolist() == [0, 0, 0, 33]
    assert (layer.rounded[0, :64] == 127).all() and not layer.rounded[0, 64:].any()  # the first row of H
    assert layer.rounded[1, 64:70].tolist() == [-127, 127, -127, 127, -127, 127]  # minus the second
    assert layer.rounded[3, :9].tolist() == [127, -127, 127, -127, -127, 127, -127, 127, 127]  # 5 shares bits with 1, 4
    assert layer.sums.tolist()[:4] == [64 * 127, 0, 0, 0]
    assert layer.scale.tolist()[:3] == pytest.approx([0.01 / 64, 0.5 / 127 / 64, 0])
    torch.testing.assert_close(layer.dequantized(), weight)
    assert layer.weight.shape == (2, 32, 16, 4)
    layer = Int8Weight.of(torch.randn(48, 128))
    assert int(layer.weight[2, 7, 5, 3]) == int(layer.rounded[2 * 16 + 5, 7 * 4 + 3])


def test_half_a_step_is_the_largest_error_of_a_turned_weight():
    weight = torch.randn(48, 192)
    layer, apart = Int8Weight.of(weight), Int8Weight.of(weight, [5, 100])
    assert (turn(layer.dequantized() - weight).abs() / 64 <= 0.501 * layer.scale[:, None]).all()
    for error in (layer.dequantized() - weight, apart.dequantized() - weight):
        assert 0.004 < error.norm() / weight.norm() < 0.008
    assert not (apart.dequantized() - weight)[:, [5, 100]].any()


@pytest.mark.parametrize("function", [int8_linear, reference])
def test_the_gradient_is_that_of_the_weight_without_rounding(function):
    x, layer, bias, _ = inputs(7, 128, 48)
    x.requires_grad_(), bias.requires_grad_()
    grad = torch.randn(7, 48)
    found = torch.autograd.grad(function(x, layer, bias), (x, bias), grad)
    torch.testing.assert_close(found[0], grad @ layer.dequantized(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found[1], grad.sum(0))


@native
@pytest.mark.slow
def test_opcheck():
    x, layer, bias, _ = inputs(5, 64, 32)
    assert torch.library.opcheck(torch.ops.qpeft_ext.int8_linear.default, (x.requires_grad_(), *layer, bias)).keys()


def test_wrong_inputs_are_errors():
    x, layer, bias, _ = inputs(5, 64, 32)
    for shape in ((5, 8), (16, 32), (24, 64), (16, 0)):
        with pytest.raises(ValueError, match=r"weight must be \[C, D\] with C % 16 == D % 64 == 0"):
            Int8Weight.of(torch.ones(shape))
    with pytest.raises(ValueError, match="weight must be finite"):
        Int8Weight.of(torch.full((16, 64), torch.nan))
    with pytest.raises(ValueError, match=r"int8_linear: x must have shape \[N, D\]"):
        int8_linear(x[:, :60], layer)
    with pytest.raises(TypeError, match="int8_linear: x must be float32, got bfloat16"):
        int8_linear(x.bfloat16(), layer)
    with pytest.raises(ValueError, match=r"int8_linear: bias must have shape \[C\]"):
        int8_linear(x, layer, bias[1:])


@native
@pytest.mark.slow
@pytest.mark.parametrize(("variable", "most", "int8", "bfloat16"), [
    ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI", 1, 1), ("ONEDNN_MAX_CPU_ISA", "avx2", 0, 0),
    ("DNNL_MAX_CPU_ISA", "SSE41", 0, 0), ("ONEDNN_MAX_CPU_ISA", "", 2, 2), ("ONEDNN_MAX_CPU_ISA", "default", 2, 2),
    ("ONEDNN_MAX_CPU_ISA", "of no processor", 2, 2),
])  # fmt: skip
def test_the_variable_that_limits_onednn_limits_kernels(variable, most, int8, bfloat16):
    ask = "import torch, qpeft_ext.ops; ops = torch.ops.qpeft_ext; "
    ask += "print(ops.int8_instructions(), ops.bfloat16_instructions())"
    environment = os.environ | {variable: most}
    asked = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True)
    found = [int(number) for number in asked.stdout.split()]
    assert found[0] <= int8 and found[1] <= bfloat16
    if not os.environ.get("ONEDNN_MAX_CPU_ISA"):
        assert found[0] == min(int8, int(torch.ops.qpeft_ext.int8_instructions()))


def test_a_default_device_does_not_matter():
    weight = torch.randn(16, 64)
    with torch.device("meta"):
        layer = Int8Weight.of(weight, [2])
    for made, expected in zip(layer, Int8Weight.of(weight, [2]), strict=True):
        assert torch.equal(made, expected)


@native
def test_direct_calls_cannot_read_out_of_bounds():
    x, layer, bias, _ = inputs(5, 64, 32)
    call = torch.ops.qpeft_ext.int8_linear
    other = {"columns": torch.tensor([64], dtype=torch.int32), "exact": torch.ones(1, 32)}
    for wrong, words in [
        ((x[:, :63], *layer, None), "x must have a multiple of 64 columns"),
        ((x, *layer._replace(weight=layer.weight[:, :15]), None), "weight must have size"),
        ((x, *layer._replace(scale=layer.scale[1:]), None), "scale must have size"),
        ((x, *layer._replace(sums=layer.sums.float()), None), "sums has the wrong dtype"),
        ((x, *layer._replace(exact=layer.exact[:0, 1:]), None), "exact must have size"),
        (
            (x, *layer._replace(**other), None),
            "columns must",
        ),
        ((x, *layer, bias[:31]), "bias must have size"),
    ]:
        with pytest.raises(RuntimeError, match=f"int8_linear: {words}"):
            call(*wrong)
    assert torch.equal(call(x, *layer, None, 77), call(x, *layer, None))  # what is not there is not run
    assert call(x, *layer, None, -3).shape == (5, 32)
