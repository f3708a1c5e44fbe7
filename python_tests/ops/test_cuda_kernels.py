"""Every CUDA primitive against the CPU's: indexing, masks, barriers.

They run on a GPU where there is one, and everywhere on the CPU: cuda_replica/ compiles the same sources, glue and
kernels, against a small stand-in for CUDA. There the inputs end at a page that may not be touched, so that reading
past one crashes, and every case also runs with threads and blocks in the opposite order and must give the same bits.
"""

import ctypes
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qpeft_ext.ops as ops
from qpeft_ext import _library

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"
PRIMITIVES = [
    "document_rows_distinct",
    "document_rows_gather",
    "similarity_topk_reduce",
    "similarity_topk_select",
    "clue_attention_softmax",
    "clue_attention_softmax_backward",
    "token_log_likelihood_chunk",
    "token_log_likelihood_chunk_backward",
]

pytestmark = pytest.mark.skipif(
    _library.REFERENCE or not SOURCES.is_dir() or sys.platform != "linux", reason="needs the library and its sources"
)


@pytest.fixture(scope="session")
def replica():
    """``torch.ops.qpeft_cuda_replica``, built where needed (a few seconds)."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if not all(shutil.which(tool, path=path) for tool in ("cmake", "ninja")):
        pytest.skip("cmake or ninja is missing")
    build = ROOT / "build" / f"replica-{sys.implementation.cache_tag}"
    environment = {**os.environ, "PATH": path, "QPEFT_CUDA": "0"}
    configure = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    for command in (configure, ["cmake", "--build", build, "--target", "cuda_replica"]):
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr
    torch.ops.load_library(build / "cuda_replica.so")
    return torch.ops.qpeft_cuda_replica


cpu = torch.ops.qpeft_ext


def guarded(x: torch.Tensor) -> torch.Tensor:
    """A copy whose last byte is the last before a page without access."""
    size, page = x.numel() * x.element_size(), mmap.PAGESIZE
    if size == 0:
        return x.clone()
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc, no_access = ctypes.CDLL(None), 0
    assert libc.mprotect(ctypes.c_void_p(address + pages * page), page, no_access) == 0
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=pages * page - size)
    return copy.view(x.shape).copy_(x)


class OnReplica:
    """Runs a primitive in both orders of threads: returns its results, or the arguments ``outputs`` that it fills."""

    def __init__(self, replica):
        self.ops = replica

    def __call__(self, name, *arguments, outputs=()):
        return same_bits(self.run(order, name, arguments, outputs) for order in ("forward", "backward"))

    def run(self, order, name, arguments, outputs):
        copies = [guarded(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        os.environ["QPEFT_REPLICA_ORDER"] = order
        try:
            returned = getattr(self.ops, name)(*copies)
        finally:
            del os.environ["QPEFT_REPLICA_ORDER"]
        return [copies[i] for i in outputs] or as_list(returned)


class OnGPU:
    """The same on a GPU, twice."""

    def __call__(self, name, *arguments, outputs=()):
        return same_bits(self.run(name, arguments, outputs) for _ in range(2))

    def run(self, name, arguments, outputs):
        copies = [x.cuda() if isinstance(x, torch.Tensor) else x for x in arguments]
        returned = getattr(torch.ops.qpeft_ext, name)(*copies)
        return [x.cpu() for x in [copies[i] for i in outputs] or as_list(returned)]


def as_list(returned):
    return [returned] if isinstance(returned, torch.Tensor) else list(returned)


def same_bits(results):
    first, second = results
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), "the result depends on the order of the threads"
    return first


@pytest.fixture(params=["replica", pytest.param("gpu", marks=pytest.mark.cuda)])
def run(request):
    if request.param == "replica":
        return OnReplica(request.getfixturevalue("replica"))
    live, why = _library.kernels_live()["cuda"]
    return OnGPU() if live else pytest.skip(why)


def assert_close(ours, truth, tolerance=1e-5):
    for a, b in zip(ours, truth, strict=True):
        if b.is_floating_point():
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(a, b)


def documents(B, S, V, G=1, seed=0):
    """Ids with repetitions; the first document empty, the last one full, wrong ids under a False mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (B, S), generator=generator)
    lengths = torch.arange(B) * S // max(B - 1, 1) if B > 1 else torch.tensor([S])
    mask = torch.arange(S) < lengths[:, None]
    mask &= (torch.rand(B, S, generator=generator) < 0.9) | (torch.arange(B) == B - 1)[:, None]
    ids = ids.masked_fill(~mask, V + 5)
    return ids, mask, torch.randint(0, G, (B,), generator=generator)


@pytest.mark.parametrize(("B", "S", "V", "G"), [(1, 1, 1, 1), (5, 37, 40, 3), (4, 300, 97, 2), (3, 20, 9000, 2)])
def test_distinct(run, B, S, V, G):
    ids, mask, group = documents(B, S, V, G)
    rows, offsets, *per_document = run("document_rows_distinct", ids, mask, group, G, V)
    true_rows, true_offsets, *truth = cpu.document_rows_distinct(ids, mask, group, G, V)
    assert torch.equal(offsets, true_offsets)
    for first, last in zip(offsets[:-1], offsets[1:], strict=True):
        assert torch.equal(rows[first:last], true_rows[first:last].sort().values)  # the order inside a group is free
    found, slots, counts, lengths = per_document
    true_found, _, true_counts, true_lengths = truth
    assert_close((found, counts, lengths), (true_found, true_counts, true_lengths))
    filled = found >= 0
    assert torch.equal(rows[slots[filled].long()], found[filled]) and bool((slots[~filled] == -1).all())
    slot_group = torch.searchsorted(offsets[1:], slots.long(), right=True)
    assert bool((slot_group == group[:, None])[filled].all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "D"), [(1, 1), (7, 37), (3, 600)])
def test_gather(run, dtype, n, D):
    sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    table = torch.randn(11, D).to(dtype)
    table[4] = 0
    rows = torch.tensor([10, -1, 4, 0, 10, 3, 9])[:n]
    block, norms = torch.full((n, D), torch.nan, dtype=dtype), torch.full((n,), torch.nan, dtype=sum_dtype)
    block, norms = run("document_rows_gather", table, rows, block, norms, outputs=(2, 3))
    truth = torch.where((rows < 0)[:, None], torch.zeros((), dtype=dtype), table[rows])
    length = truth.to(sum_dtype).norm(dim=1)
    assert torch.equal(block, truth)
    assert_close([norms], [torch.where(length > 0, 1 / length, 0)], 1e-6)


def test_gather_with_strides(replica):
    table, block = torch.randn(9, 16)[:, 3:10], torch.zeros(2, 12)
    replica.document_rows_gather(table, torch.tensor([8, 2]), block[:, 4:11], None)
    assert torch.equal(block[:, 4:11], table[[8, 2]])
    assert block[:, :4].count_nonzero() == block[:, 11:].count_nonzero() == 0


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize(("n", "M", "T"), [(1, 1, 1), (37, 3, 5), (300, 2, 4)])
def test_similarity_reduce(run, n, M, T, norms):
    similarity = torch.randint(-3, 4, (n, M * T)).float()  # many ties
    inverse = torch.rand(n) if norms else None
    mask = torch.rand(M, T) < 0.7
    mask[-1] = False  # a query without tokens
    buffers = torch.zeros(M, n), torch.zeros(M, n, dtype=torch.int32)
    ours = run("similarity_topk_reduce", similarity, inverse, mask, *buffers, outputs=(3, 4))
    cpu.similarity_topk_reduce(similarity, inverse, mask, *buffers)
    assert_close(ours, buffers, 0)


@pytest.mark.parametrize("k", [1, 10, 400])
@pytest.mark.parametrize(("B", "S", "V"), [(1, 1, 1), (5, 37, 30), (3, 600, 500)])
def test_similarity_select(run, B, S, V, k):
    ids, mask, group = documents(B, S, V)
    rows, _, ids, slots, *_ = cpu.document_rows_distinct(ids, mask, group, 1, V)
    M, U = 3, len(rows)
    best = torch.randint(-4, 5, (M, U)).float()  # ties: the earlier token wins
    positions = torch.randint(0, 9, (M, U), dtype=torch.int32)
    best_row = torch.arange(B) % (M + 1)  # a row that is not there gives padding
    arguments = best, positions, best_row, ids, slots, k
    assert_close(run("similarity_topk_select", *arguments), cpu.similarity_topk_select(*arguments), 0)


@pytest.mark.parametrize(("P", "n", "R"), [(1, 1, 1), (3, 12, 1), (4, 37, 33), (3, 9, 64)])
def test_softmax(run, P, n, R):
    U, first = n + 3, 5
    slots = torch.stack([torch.randperm(U)[:n] for _ in range(P)]).int() + first
    slots[0, n // 2 :] = -1
    slots[-1, 0] = -1
    if P > 1:
        slots[1] = -1  # a document without tokens
    counts = torch.randint(1, 4, (P, n), dtype=torch.int32) * (slots >= 0)
    scores = 5 * torch.randn(U, R)
    (weights,) = run("clue_attention_softmax", scores, slots, counts, first)
    truth = cpu.clue_attention_softmax(scores, slots, counts, first)
    assert_close([weights], [truth], 1e-6)
    grad_weights, grad_scores = torch.randn(P, n, R), torch.randn(U, R)
    backward = truth, grad_weights, slots, first, grad_scores
    ours = run("clue_attention_softmax_backward", *backward, outputs=(1, 4))
    cpu.clue_attention_softmax_backward(*backward)
    assert_close(ours, (grad_weights, grad_scores))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(("bias", "soft_cap"), [(False, None), (True, None), (True, 3.0)])
@pytest.mark.parametrize("sizes", [[1], [37, 5], [300, 513]])
def test_likelihood_chunks(run, sizes, bias, soft_cap, keep):
    N, V, scale = 5, sum(sizes), 0.7
    logits, words = 4 * torch.randn(N, V), torch.randn(V) if bias else None
    if len(sizes) > 1:
        logits[2, : sizes[0]] = -torch.inf  # a first chunk without a possible word
    targets = torch.tensor([0, V - 1, V - 1, V // 2, 0])
    ours = torch.tensor([-torch.inf, 0, -torch.inf, 0])[:, None].repeat(1, N)
    truth = ours.clone()
    for first, C in zip([0, sizes[0]], sizes, strict=False):
        here = slice(first, first + C)
        rest = None if words is None else words[here], targets, first, scale, soft_cap
        x = logits[:, here].contiguous()
        y, ours = run("token_log_likelihood_chunk", x, *rest, ours, keep, outputs=(0, 6))
        cpu.token_log_likelihood_chunk(x, *rest, truth, keep)
        assert_close([ours], [truth])
        if keep:
            assert_close([y], [x])
    lse, grad = ours[0] + ours[1].log(), torch.tensor([1.0, -2.0, 0.5, 0.0, 1.0])
    x = logits[:, :C].contiguous()
    rest = None if words is None else words[:C], targets, 0, scale, soft_cap, lse, grad
    (y,) = run("token_log_likelihood_chunk_backward", x, *rest, outputs=(0,))
    cpu.token_log_likelihood_chunk_backward(x, *rest)
    assert_close([y], [x])


def test_empty(run):
    long, none = torch.empty(0, dtype=torch.long), torch.empty(0, 4, dtype=torch.long)
    rows, offsets, *_ = run("document_rows_distinct", none, none.bool(), long, 2, 7)
    assert len(rows) == 0 and offsets.tolist() == [0, 0, 0]
    run("document_rows_gather", torch.randn(3, 2), long, torch.empty(0, 2), None, outputs=(2,))
    best, padding = torch.empty(1, 0), torch.full((2, 3), -1)
    scores, clue_ids, _ = run(
        "similarity_topk_select", best, best.int(), torch.zeros(2, dtype=torch.long), padding, padding.int(), 2
    )
    assert scores.tolist() == [[-torch.inf] * 2] * 2 and clue_ids.tolist() == [[-1, -1]] * 2
    slots = torch.empty(0, 3, dtype=torch.int32)
    assert run("clue_attention_softmax", torch.randn(2, 4), slots, slots, 0)[0].shape == (0, 3, 4)
    chunk = torch.empty(3, 0), None, torch.zeros(3).long(), 0, 1.0, None, torch.zeros(4, 3), False
    assert run("token_log_likelihood_chunk", *chunk, outputs=(6,))[0].count_nonzero() == 0


def test_wrong_values_trap(replica):
    """A GPU cannot report a wrong value without waiting for it: the kernel stops instead of reading elsewhere."""
    one = torch.ones(1, 1, dtype=torch.bool)
    for wrong in (-1, 7):
        with pytest.raises(RuntimeError, match="document_rows_distinct: .*trap"):
            replica.document_rows_distinct(torch.tensor([[wrong]]), one, torch.zeros(1).long(), 1, 7)
        with pytest.raises(RuntimeError, match="document_rows_distinct: .*trap"):
            replica.document_rows_distinct(torch.tensor([[0]]), one, torch.tensor([wrong]), 1, 7)
    for wrong in (-2, 3):
        with pytest.raises(RuntimeError, match="document_rows_gather: .*trap"):
            replica.document_rows_gather(torch.randn(3, 2), torch.tensor([wrong]), torch.empty(1, 2), None)
    with pytest.raises(RuntimeError, match="similarity_topk_select: .*trap"):
        zero = torch.zeros(1, 1, dtype=torch.int32)
        replica.similarity_topk_select(torch.tensor([[torch.nan]]), zero, torch.zeros(1).long(), zero.long(), zero, 1)


@pytest.fixture
def use_replica(replica, monkeypatch):
    """The operators in Python, with the CUDA kernels below them."""
    for name in PRIMITIVES:
        monkeypatch.setattr(torch.ops.qpeft_ext, name, getattr(replica, name))


def operator_inputs(Q=3, T=5, B=7, S=40, V=60, D=24):
    torch.manual_seed(0)
    ids, mask, query_index = documents(B, S, V, Q, seed=1)
    query_mask = torch.rand(Q, T) < 0.8
    query_mask[:, 0] = True
    return torch.randn(Q, T, D), query_mask, torch.randn(V, D), ids, mask, query_index


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_similarity_topk_on_cuda_kernels(use_replica, metric):
    from qpeft_ext.ops.similarity_topk import reference

    inputs = operator_inputs()
    for a, b in zip(ops.similarity_topk(*inputs, 6, metric), reference(*inputs, 6, metric), strict=True):
        assert_close([a], [b])


def test_clue_attention_on_cuda_kernels(use_replica):
    from qpeft_ext.ops.clue_attention import reference

    torch.manual_seed(1)
    inputs, D = operator_inputs(), 24
    weights = [torch.randn(D, D, requires_grad=True) for _ in range(4)]
    biases = [torch.randn(D, requires_grad=True) for _ in range(4)]
    results, gradients = [], []
    for function, dtype in ((ops.clue_attention, torch.float32), (reference, torch.float64)):
        query, *rest = (x.to(dtype) if x.is_floating_point() else x for x in inputs)
        query.requires_grad_()
        result = function(query, *rest, *(x.to(dtype) for x in weights + biases), num_heads=4)
        results.append(result.float())
        gradients.append(torch.autograd.grad(result.square().sum(), [query, *weights, *biases]))
    assert_close(results[:1], results[1:], 1e-4)
    for ours, truth in zip(*gradients, strict=True):
        assert (ours - truth).norm() <= 1e-4 * truth.norm() + 1e-6


def test_token_log_likelihood_on_cuda_kernels(use_replica):
    from qpeft_ext.ops.token_log_likelihood import reference

    hidden, lm_head, targets = torch.randn(9, 16), torch.randn(70, 16), torch.randint(0, 70, (9,))
    results = []
    for function in (ops.token_log_likelihood, reference):
        x, w = hidden.clone().requires_grad_(), lm_head.clone().requires_grad_()
        log_p = function(x, w, targets, torch.ones(70), 20.0, 0.5, chunk_bytes=2000)
        results.append((log_p, *torch.autograd.grad(log_p.sum(), (x, w))))
    assert_close(*results)
