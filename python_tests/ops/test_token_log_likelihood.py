from typing import NamedTuple

import pytest
import torch
from inputs import to_float64
from torch import Tensor
from torch._subclasses import FakeTensorMode

from qpeft_ext.ops import _common, token_log_likelihood
from qpeft_ext.ops._common import exact_float32, multiply_rows
from qpeft_ext.ops.hardware import few_heights
from qpeft_ext.ops.token_log_likelihood import CPU_BUFFER, _sizes, reference

SETTINGS = [{}, {"soft_cap": 3.0}, {"logit_scale": 0.3}, {"soft_cap": 2.0, "logit_scale": 1.7}]


class Inputs(NamedTuple):
    hidden: Tensor  # [N, D]
    lm_head: Tensor  # [V, D]
    target_ids: Tensor  # [N]
    bias: Tensor | None  # [V]


def make_inputs(N=13, D=16, V=37, bias=True, dtype=torch.float32, device="cpu", seed=3) -> Inputs:
    random = torch.Generator().manual_seed(seed)
    target_ids = torch.randint(V, (N,), generator=random)
    target_ids[-1:], target_ids[:1] = V - 1, 0  # both ends of the vocabulary
    tensors = [torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for shape in ((N, D), (V, D), (V,))]
    hidden, lm_head, some_bias = (x.to(device) for x in tensors)
    return Inputs(hidden, lm_head, target_ids.to(device), some_bias if bias else None)


SIZES = [(1, 1, 1 << 20), (13, 37, 1), (13, 37, 1 << 20), (5, 1000, 4000), (0, 7, 1)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("N, V, chunk_bytes", SIZES)
def test_matches_reference(N, V, chunk_bytes, settings, dtype, device):
    for bias in (False, True):
        x = make_inputs(N=N, V=V, bias=bias, dtype=dtype, device=device)
        truth = reference(*to_float64(x), **settings)  # inputs are exact in float64
        result = token_log_likelihood(*x, **settings, chunk_bytes=chunk_bytes)
        assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(result.double(), truth, rtol=1e-5, atol=1e-5)


def test_large_logits_do_not_overflow_and_are_not_rounded(device):
    x = make_inputs(N=50, D=64, V=500, dtype=torch.bfloat16, device=device)
    x = x._replace(hidden=x.hidden * 100)
    truth = reference(*to_float64(x))
    torch.testing.assert_close(token_log_likelihood(*x, chunk_bytes=4000).double(), truth, rtol=1e-5, atol=1e-3)


def test_probabilities_sum_to_one(device):
    x = make_inputs(N=1, V=40, device=device)
    x = Inputs(x.hidden.expand(40, -1), x.lm_head, torch.arange(40, device=device), x.bias)
    for chunk_bytes in (1, 1 << 20):
        total = token_log_likelihood(*x, soft_cap=5.0, chunk_bytes=chunk_bytes).exp().sum().cpu()
        torch.testing.assert_close(total, torch.tensor(1.0))


def test_forbidden_words(device):
    x = make_inputs(device=device)
    x.bias[:20] = -torch.inf  # whole chunks of them
    x = x._replace(target_ids=x.target_ids.clamp_min(20), hidden=x.hidden.requires_grad_())
    for chunk_bytes in (1, 1000, 1 << 20):
        result = token_log_likelihood(*x, chunk_bytes=chunk_bytes)
        torch.testing.assert_close(result, reference(*x), rtol=1e-5, atol=1e-5)
        ours, truth = (torch.autograd.grad(y.sum(), x.hidden)[0] for y in (result, reference(*x)))
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("word", [0, 20, 36])
def test_nan_is_seen(word, device):
    x = make_inputs(device=device)
    x.lm_head[word] = torch.nan
    for chunk_bytes in (1000, 1 << 20):
        assert token_log_likelihood(*x, chunk_bytes=chunk_bytes).isnan().all()


def gradients(x, function=token_log_likelihood, **settings):
    inputs = [None if y is None else y.clone().requires_grad_() for y in (x.hidden, x.lm_head, x.bias)]
    result = function(inputs[0], inputs[1], x.target_ids, inputs[2], **settings)
    scale = torch.linspace(-1, 1, len(result), device=result.device, dtype=result.dtype)
    return torch.autograd.grad((result * scale).sum(), [y for y in inputs if y is not None])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_matches_reference(dtype, settings, device):
    x = make_inputs(N=40, V=101, dtype=dtype, device=device)
    truth = gradients(x._make(to_float64(x)), reference, **settings)
    low = dtype == torch.bfloat16  # gradients are rounded to it
    for chunk_bytes in (3000, 1 << 20):
        for ours, theirs in zip(gradients(x, **settings, chunk_bytes=chunk_bytes), truth, strict=True):
            tolerance = {"rtol": 1e-2, "atol": 1e-2} if low else {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(ours.double(), theirs, **tolerance)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradcheck(settings, device):
    x = make_inputs(N=4, D=3, V=7, dtype=torch.float64, device=device)
    for wanted in ((0,), (1,), (3,), (0, 1, 3)):
        inputs = [y.clone().requires_grad_() if i in wanted else y for i, y in enumerate(x)]

        def function(*inputs):
            return token_log_likelihood(*inputs, **settings, chunk_bytes=100)

        assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad, device):
    x = make_inputs(device=device)
    for settings in ((None, 1.0, 1000, grad), (2.0, 0.5, 1000, grad)):
        hidden, lm_head, bias = (y.requires_grad_(grad) for y in (x.hidden, x.lm_head, x.bias))
        torch.library.opcheck(
            torch.ops.qpeft_ext.token_log_likelihood, (hidden, lm_head, x.target_ids, bias, *settings)
        )


@pytest.mark.parametrize(
    "change, error, words",
    [
        (lambda x: {"lm_head": x.lm_head[:, :4]}, ValueError, r"lm_head must have shape \[V, D\] = \[any, 16\]"),
        (lambda x: {"target_ids": x.target_ids[1:]}, ValueError, r"target_ids must have shape \[N\] = \[13\]"),
        (lambda x: {"bias": x.bias[1:]}, ValueError, r"bias must have shape \[V\] = \[37\], got \[36\]"),
        (lambda x: {"target_ids": x.target_ids.int()}, TypeError, "target_ids must be int64, got int32"),
        (lambda x: {"lm_head": x.lm_head.double()}, TypeError, "lm_head must have the dtype of hidden"),
        (lambda x: {"soft_cap": 0.0}, ValueError, "soft_cap must be positive or None, got 0.0"),
        (lambda x: {"chunk_bytes": 0}, ValueError, "chunk_bytes must be positive, got 0"),
    ],
)
def test_rejects(change, error, words, device):
    x = make_inputs(device=device)
    with pytest.raises(error, match=f"token_log_likelihood: {words}"):
        token_log_likelihood(**{**x._asdict(), **change(x)})


@pytest.mark.parametrize("id", [-1, 37])
def test_rejects_ids_out_of_range(id):
    x = make_inputs()
    x.target_ids[2] = id
    with pytest.raises(IndexError, match=rf"token_log_likelihood: target_ids\[2\] = {id} is outside \[0, V\)"):
        token_log_likelihood(*x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "wanted"), [(200, False), (200, True), (3000, True)])
def test_memory_is_bounded_by_chunk_bytes(N, wanted, dtype):
    x = make_inputs(N=N, D=64, V=20_000, bias=False, dtype=dtype)
    x = x._replace(hidden=x.hidden.requires_grad_(wanted))
    chunk_bytes = 1 << 20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = token_log_likelihood(*x, chunk_bytes=chunk_bytes)
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    outputs = 2 * result.nbytes + 4 * x.hidden.numel() * wanted
    assert 0.2 * chunk_bytes < peak < 1.1 * chunk_bytes + outputs  # of logits of 16 MB and 240 MB


@pytest.mark.parametrize("setting", ["legacy", "medium", "own", "inherited", "none"])
def test_tf32_is_off_inside_and_the_setting_returns(setting):
    matmul = torch.backends.cuda.matmul

    def state():
        return matmul.fp32_precision, torch.backends.fp32_precision

    try:
        if setting == "legacy":
            matmul.allow_tf32 = True
        elif setting == "medium":
            torch.set_float32_matmul_precision("medium")
        elif setting == "own":
            matmul.fp32_precision = "tf32"
        elif setting == "inherited":
            torch.backends.fp32_precision = "tf32"
        before = state()
        assert (before[0] == "tf32") == (setting != "none")
        with FakeTensorMode():
            x = torch.empty(1, device="cuda")
        with exact_float32(x), exact_float32(x):
            assert matmul.fp32_precision != "tf32"
        assert state() == before
        with exact_float32(x.bfloat16()):
            assert state() == before
        if setting in ("legacy", "medium"):
            assert matmul.allow_tf32
            assert torch.get_float32_matmul_precision() == ("high" if setting == "legacy" else "medium")
        if setting == "inherited":  # it is still inherited
            torch.backends.fp32_precision = "ieee"
            assert matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = "none"


def test_products_of_ragged_heights_have_few_shapes():
    heights = {few_heights(height) for height in range(1, 2049)}
    assert len(heights) <= 31 + 16 * 6 + 1
    assert all(height <= few_heights(height) <= 1.0625 * height for height in range(1, 2049))
    for height in (1, 31, 33, 100, 517):
        a, rows = torch.randn(height, 24, dtype=torch.float32), torch.randn(50, 24)
        torch.testing.assert_close(multiply_rows(a, rows), a @ rows.T)


@pytest.mark.parametrize("has_products", [False, True])
@pytest.mark.parametrize("N, V, D", [(60, 16384, 512), (1000, 16384, 512), (60, 128256, 2048)])
def test_no_buffer_on_the_cpu_is_mapped_anew(N, V, D, has_products, monkeypatch):
    """Buffers of 32 MB and more cost page faults in every call, which took longer than the product."""
    monkeypatch.setattr(_common, "has_bfloat16_products", lambda: has_products)
    sizes = _sizes(torch.empty(N, D, dtype=torch.bfloat16), torch.empty(V, D, dtype=torch.bfloat16), 64 << 20, 0)
    assert sizes.rows == N and 4 * max(N, 0 if has_products else D) * sizes.words <= CPU_BUFFER
    assert sizes.words >= 256  # narrow products are slow
