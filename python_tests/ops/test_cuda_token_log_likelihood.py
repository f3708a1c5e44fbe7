"""token_log_likelihood on CUDA against the CPU and the definition."""

import inspect

import pytest
import torch
from inputs import to_float64
from on_cuda import assert_close, check_in_a_graph, cpu
from test_token_log_likelihood import SETTINGS, gradients, make_inputs

import qpeft_ext.ops as ops
from qpeft_ext.ops.token_log_likelihood import _whole_waves, reference

pytestmark = pytest.mark.slow

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def sum_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def rounding(dtype):
    """Return half a unit in the last place of a 16-bit number, plus the rounding of float32."""
    return {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 0) + 1e-5


def inputs(N, V, bias, dtype, seed=0):
    random = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(N, V, generator=random).to(sum_dtype(dtype))
    words = torch.randn(V, generator=random).to(logits.dtype) if bias else None
    return logits, words, torch.tensor([0, V - 1, V - 1, V // 2, 0])[:N]


@pytest.mark.parametrize("kept", [None, *DTYPES], ids=str)
@pytest.mark.parametrize(("bias", "soft_cap"), [(False, None), (True, 3.0)])
@pytest.mark.parametrize("sizes", [[1], [37, 5], [300, 512], [4099, 4096]])  # unaligned, aligned, two steps
def test_chunks(run, sizes, bias, soft_cap, kept):
    N, V, D, scale, dtype = 5, sum(sizes), 19, 0.7, kept or torch.float32
    logits, words, targets = inputs(N, V, bias, dtype)
    if len(sizes) > 1:
        logits[2, : sizes[0]] = -torch.inf  # a first chunk without a possible word
    logits[3, 0] = -torch.inf
    ours = torch.tensor([-torch.inf, 0, -torch.inf], dtype=logits.dtype)[:, None].repeat(1, N)
    truth, our_sums = ours.clone(), None if kept is None else torch.zeros(N, D, dtype=logits.dtype)
    true_sums = None if kept is None else our_sums.clone()
    for first, C in zip([0, sizes[0]], sizes, strict=False):
        here = slice(first, first + C)
        rest = None if words is None else words[here], targets, first, scale, soft_cap
        x = logits[:, here].contiguous()
        y, ours, *more = run(
            "token_log_likelihood_chunk", x, *rest, ours, our_sums, dtype, outputs=(0, 6, 7)[: 3 if kept else 2]
        )
        cpu.token_log_likelihood_chunk(x, *rest, truth, true_sums, x.dtype)
        assert_close([ours], [truth])
        if kept:
            our_sums = more[0]
            assert_close([our_sums], [true_sums])
            assert_close([y.view(kept)[:, :C].to(x.dtype)], [x], rounding(kept))
            our_sums, true_sums = (sums + x.sum(1, keepdim=True) for sums in (our_sums, true_sums))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("C", [1, 37, 512, 4099])
def test_chunk_backward(run, C, soft_cap, dtype):
    logits, words, targets = inputs(5, C, soft_cap is not None, dtype)
    logits[1, 1:] = -torch.inf
    lse, grad = logits.logsumexp(1) + 1, torch.tensor([1.0, -2.0, 0.5, 0.0, 1.0], dtype=logits.dtype)
    logits[3] = torch.nan  # a row that does not count
    arguments = words, targets, 0, 0.7, soft_cap, lse, grad
    (y,) = run("token_log_likelihood_chunk_backward", logits, *arguments, dtype, outputs=(0,))
    cpu.token_log_likelihood_chunk_backward(logits, *arguments, logits.dtype)
    assert_close([y.view(dtype)[:, :C].to(logits.dtype)], [logits], rounding(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("D", "wanted"), [(1, True), (300, True), (8, False)])
def test_finish(run, D, wanted, dtype):
    N, V = 5, 7
    lm_head, targets = torch.randn(V, D).to(dtype), torch.tensor([0, 6, 3, 3, 1])
    running = torch.rand(3, N, dtype=sum_dtype(dtype))
    poison = torch.full((N,), torch.nan, dtype=running.dtype)
    sums = torch.randn(N, D, dtype=running.dtype) if wanted else None
    rest = running, lm_head, targets, 0.7, 2.0, poison, poison, sums
    ours = run("token_log_likelihood_finish", *rest, outputs=(5, 6, 7)[: 3 if wanted else 2])
    slope = 1 - (running[2] / 2).square()
    lse = running[0] + running[1].log()
    truth = [running[2] - lse, lse]
    if wanted:
        truth.append(0.7 * (slope[:, None] * lm_head[targets].to(lse.dtype) - sums / running[1, :, None]))
    assert_close(ours, truth)
    rest = *rest[:5], poison.clone(), poison.clone(), None if sums is None else sums.clone()
    cpu.token_log_likelihood_finish(*rest)
    assert_close([x for x in rest[5:] if x is not None], truth)


def test_finish_takes_any_strides(replica):
    lm_head, targets, running = torch.randn(4, 7).T, torch.tensor([6, 2]), torch.rand(3, 2)
    sums, log_p, lse = torch.zeros(2, 4), torch.empty(2), torch.empty(2)
    replica.token_log_likelihood_finish(running, lm_head, targets, 1.0, None, log_p, lse, sums)
    assert_close([sums], [lm_head[targets]])


def test_wrong_ids_trap(replica):
    for wrong in (-1, 3):
        outputs = torch.empty(1), torch.empty(1), None
        arguments = torch.rand(3, 1), torch.randn(3, 2), torch.tensor([wrong]), 1.0, None, *outputs
        with pytest.raises(RuntimeError, match="token_log_likelihood_finish: .*trap"):
            replica.token_log_likelihood_finish(*arguments)
        with pytest.raises(RuntimeError, match=r"token_log_likelihood_finish: target_ids\[0\] is outside \[0, V\)"):
            cpu.token_log_likelihood_finish(*arguments)


def test_empty(run):
    chunk = torch.empty(3, 0), None, torch.zeros(3).long(), 0, 1.0, None, torch.zeros(3, 3), None, torch.float32
    assert run("token_log_likelihood_chunk", *chunk, outputs=(6,))[0].count_nonzero() == 0
    none = torch.empty(0)
    finish = torch.empty(3, 0), torch.empty(2, 4), none.long(), 1.0, None, none, none, torch.empty(0, 4)
    assert run("token_log_likelihood_finish", *finish, outputs=(5,))[0].numel() == 0


@pytest.fixture
def use_replica(replica, monkeypatch):
    """Run the operator as on CUDA, with rows in 16 bits; its GEMMs, which the CPU does not have, are in float32."""
    for name in ("chunk", "finish", "chunk_backward"):
        name = f"token_log_likelihood_{name}"
        monkeypatch.setattr(cpu, name, getattr(replica, name))

    def product(a, rows, out):
        if out is None:
            out = torch.empty(len(a), -(-len(rows) // 16) * 16)[:, : len(rows)]
        return torch.mm(a.to(out.dtype), rows.T.to(out.dtype), out=out)

    module = inspect.unwrap(ops.token_log_likelihood).__globals__
    monkeypatch.setitem(module, "block_dtype", lambda table: table.dtype)
    monkeypatch.setitem(module, "multiply_rows", product)
    monkeypatch.setitem(module, "add_product", lambda total, a, b: total.addmm_(a.to(total.dtype), b.to(total.dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", SETTINGS[::3], ids=str)
@pytest.mark.parametrize("chunk_bytes", [800, 5000, 1 << 20])  # one row at a time, chunks of words, all at once
def test_token_log_likelihood_on_cuda_kernels(use_replica, chunk_bytes, settings, dtype):
    x = make_inputs(N=13, V=101, dtype=dtype)
    truth = x._make(to_float64(x))
    ours = ops.token_log_likelihood(*x, **settings, chunk_bytes=chunk_bytes)
    torch.testing.assert_close(ours.double(), reference(*truth, **settings), rtol=1e-5, atol=1e-5)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    ours = gradients(x, **settings, chunk_bytes=chunk_bytes)
    for a, b in zip(ours, gradients(truth, reference, **settings), strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_in_a_graph(dtype):
    def step(*x):
        return gradients(type(inputs)(*x), soft_cap=20.0, chunk_bytes=40_000)

    inputs, other = (make_inputs(N=40, V=1001, D=64, dtype=dtype, seed=seed) for seed in (3, 4))
    check_in_a_graph(step, inputs, other)


def test_chunks_fill_whole_waves():
    h200 = 132, 60 << 20
    assert _whole_waves(1600, 128256, 10000, *h200) == 19 * 256  # 13 x 19 tiles: two waves of 132 processors
    assert _whole_waves(512, 128256, 30000, *h200) == 32 * 256  # 4 x 32: one wave, and the last chunk another
    assert _whole_waves(1600, 128256, 100, *h200) == 100  # the budget is the budget
    assert _whole_waves(16, 5000, 10**6, *h200) == 5000
