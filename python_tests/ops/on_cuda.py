"""Run CUDA primitives in tests: on the replica in both orders of threads, and on a GPU twice.

cuda_replica/ compiles the shipped sources, glue and kernels, against a small stand-in for CUDA. There the inputs end at
a page that may not be touched, so that reading past one crashes; memory that an operator allocates is full of NaN; and
every case also runs with threads and blocks in the opposite order and must give the same bits.
"""

import contextlib
import ctypes
import fcntl
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qpeft_ext.ops  # noqa: F401  loads the library
from qpeft_ext.ops import _library

ROOT = Path(__file__).parents[2]
cpu = torch.ops.qpeft_ext


def build_replica():
    """Build ``torch.ops.qpeft_cuda_replica`` if its sources have changed (a quarter of a minute), and return it."""
    if _library.REFERENCE or not (ROOT / "csrc" / "cuda").is_dir() or sys.platform != "linux":
        pytest.skip("needs the library and its sources")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if not all(shutil.which(tool, path=path) for tool in ("cmake", "ninja")):
        pytest.skip("cmake or ninja is missing")
    build = ROOT / "build" / f"replica-{sys.implementation.cache_tag}"
    environment = {**os.environ, "PATH": path, "QPEFT_CUDA": "0"}
    configure = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    build.mkdir(parents=True, exist_ok=True)
    with open(build / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests in several processes share the folder
        for command in (configure, ["cmake", "--build", build, "--target", "cuda_replica"]):
            ran = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert ran.returncode == 0, ran.stdout + ran.stderr
    torch.ops.load_library(build / "cuda_replica.so")
    return torch.ops.qpeft_cuda_replica


def guarded(x: torch.Tensor) -> torch.Tensor:
    """Return a copy whose last byte is the last before a page without access."""
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


@contextlib.contextmanager
def poisoned_memory():
    """Fill new tensors with NaN (integers: with the largest number) instead of whatever was in memory."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class OnReplica:
    """Runs a primitive in both orders of threads; returns its results, or the ``outputs`` that it fills."""

    def __init__(self, replica):
        self.ops = replica

    def __call__(self, name, *arguments, outputs=()):
        return same_bits(self.run(order, name, arguments, outputs) for order in ("forward", "backward"))

    def run(self, order, name, arguments, outputs):
        copies = [guarded(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        os.environ["QPEFT_REPLICA_ORDER"] = order
        try:
            with poisoned_memory():
                returned = getattr(self.ops, name)(*copies)
        finally:
            del os.environ["QPEFT_REPLICA_ORDER"]
        return [copies[i] for i in outputs] or as_list(returned)


class OnGPU:
    """A function that does the same on a GPU, twice."""

    def __call__(self, name, *arguments, outputs=()):
        return same_bits(self.run(name, arguments, outputs) for _ in range(2))

    def run(self, name, arguments, outputs):
        copies = [x.cuda() if isinstance(x, torch.Tensor) else x for x in arguments]
        with poisoned_memory():
            returned = getattr(torch.ops.qpeft_ext, name)(*copies)
        return [x.cpu() for x in [copies[i] for i in outputs] or as_list(returned)]


def check_in_a_graph(step, inputs, other):
    """Check that ``step(*inputs)`` waits for nothing, and that a graph captured from it follows new inputs.

    inputs, other: tensors of equal shapes and dtypes, copied to the GPU. Replays must give the bits of direct calls.
    """
    live, why = _library.kernels_live()["cuda"]
    if not live:
        pytest.skip(why)
    inputs, other = ([x.cuda() for x in tensors] for tensors in (inputs, other))
    first = [x.clone() for x in inputs]
    truth = [[y.clone() for y in step(*version)] for version in (first, other)]  # also the warm-up
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(*inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*inputs)
    for version, expected in zip((other, first), reversed(truth), strict=True):
        for old, new in zip(inputs, version, strict=True):
            old.copy_(new)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def as_list(returned):
    return [returned] if isinstance(returned, torch.Tensor) else list(returned)


def same_bits(results):
    first, second = results
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), "the result depends on the order of the threads"
    return first


def assert_close(ours, truth, tolerance=1e-5):
    for a, b in zip(ours, truth, strict=True):
        if b.is_floating_point():
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(a, b)


def documents(B, S, V, G=1, seed=0):
    """Make ids with repetitions: the first document empty, the last one full, wrong ids under a False mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (B, S), generator=generator)
    lengths = torch.arange(B) * S // max(B - 1, 1) if B > 1 else torch.tensor([S])[:B]
    mask = torch.arange(S) < lengths[:, None]
    mask &= (torch.rand(B, S, generator=generator) < 0.9) | (torch.arange(B) == B - 1)[:, None]
    ids = ids.masked_fill(~mask, V + 5)
    return ids, mask, torch.randint(0, G, (B,), generator=generator)


def operator_inputs(Q=3, T=5, B=7, S=40, V=60, D=24):
    torch.manual_seed(0)
    ids, mask, query_index = documents(B, S, V, Q, seed=1)
    query_mask = torch.rand(Q, T) < 0.8
    query_mask[:, 0] = True
    return torch.randn(Q, T, D), query_mask, torch.randn(V, D), ids, mask, query_index
