"""Work that does not fit in memory is done with less, or in halves."""

import errno
import subprocess
import sys

import pytest
import torch

from qpeft_ext.lm.loading import one_line
from qpeft_ext.ops._library import registered
from qpeft_ext.utils.memory import in_halves, is_out_of_memory, retry_with_less

LACKS = [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(),
         RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")]  # fmt: skip


@pytest.mark.parametrize("lack", LACKS)
def test_work_is_tried_again_with_less(lack):
    budget = [8]

    def work():
        if budget[0] > 2:
            raise lack
        return budget[0]

    def halve():
        budget[0] //= 2
        return budget[0] > 0

    assert retry_with_less(work, halve) == 2
    with pytest.raises(type(lack)):
        retry_with_less(lambda: (_ for _ in ()).throw(lack), halve)
    with pytest.raises(RuntimeError, match="another"):
        retry_with_less(lambda: (_ for _ in ()).throw(RuntimeError("another")), lambda: True)


@pytest.mark.parametrize("lack", LACKS)
def test_items_are_computed_in_halves_and_stay_in_order(lack):
    sizes, halves = [], []

    def double(items):
        sizes.append(len(items))
        if len(items) > 2:
            raise lack
        return [2 * item for item in items]

    assert list(in_halves(double, range(7), halves.append)) == [0, 2, 4, 6, 8, 10, 12]
    assert sizes == [7, 3, 1, 2, 4, 2, 2] and halves == [3, 1, 2]
    with pytest.raises(type(lack)):
        list(in_halves(lambda items: (_ for _ in ()).throw(lack), [1, 2], halves.append))
    with pytest.raises(RuntimeError, match="another"):
        list(in_halves(lambda items: (_ for _ in ()).throw(RuntimeError("another")), [1, 2], halves.append))


@pytest.mark.parametrize(("error", "lacks_memory"), [
    (torch.OutOfMemoryError("CUDA out of memory."), True), (MemoryError(), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"), True),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."), True),
    (RuntimeError("std::bad_alloc"), True), (RuntimeError("could not create a primitive"), True),
    (RuntimeError("could not execute a primitive"), True), (RuntimeError("could not create a memory object"), True),
    (RuntimeError("can't start new thread"), True), (RuntimeError("Resource temporarily unavailable"), True),
    (RuntimeError("unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)"), True),
    (RuntimeError("CUDA error: out of memory"), True), (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), True),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), True), (OSError(errno.ENOENT, "out of memory"), False),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False), (ValueError("std::bad_alloc"), False),
])  # fmt: skip
def test_errors_that_say_that_memory_is_short(error, lacks_memory):
    assert is_out_of_memory(error) is lacks_memory


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError(), RuntimeError("std::bad_alloc")])
def test_loading_says_that_memory_is_short(error):
    """`one_line` makes errors about files of all others, for which the server has status 400."""
    with pytest.raises(type(error)) as raised, one_line("cannot load the LM x"):
        raise error
    assert raised.value is error
    with pytest.raises(ValueError, match="cannot load the LM x: another"), one_line("cannot load the LM x"):
        raise RuntimeError("another")


LACK = """
import resource
import torch
from qpeft_ext.ops._library import registered
from qpeft_ext.utils.memory import is_out_of_memory
gate = torch.randn(20_000, 1_000)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (20 << 20), resource.RLIM_INFINITY))
for work in (lambda: torch.ops.qpeft_ext.gated_silu(gate, gate), lambda: torch.empty(1 << 28)):
    try:
        work()
        print("there was memory")
    except RuntimeError as error:
        print(is_out_of_memory(error))
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not registered("gated_silu"), reason="not Linux, or the library is not loaded"
)
def test_an_operator_of_ours_without_memory_is_a_lack_of_memory():
    """Its error has other words than torch's allocator; retries in halves and status 503 depend on it."""
    run = subprocess.run([sys.executable, "-c", LACK], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True", "True"]
    assert not is_out_of_memory(RuntimeError('torch_call_dispatcher("aten::fill_", "") API call failed'))


@pytest.mark.skipif(not registered("causal_attention"), reason="the library is not loaded")
def test_a_thread_of_a_kernel_without_memory_is_a_lack_of_memory():
    keys = torch.zeros(1, 1, 1, 16).expand(1, 1, 1 << 42, 16)  # to be copied into more bytes than have addresses
    with pytest.raises(RuntimeError, match="not enough memory") as error:
        torch.ops.qpeft_ext.causal_attention(keys[:, :, :1], keys, keys, [0], 1.0)
    assert is_out_of_memory(error.value)
