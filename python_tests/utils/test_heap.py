"""Freed memory goes back to the system."""

import ctypes
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from qpeft_ext.utils.memory import in_large_pages, return_freed_memory

glibc = pytest.mark.skipif(
    not (sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallinfo2")), reason="not glibc"
)
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
FAULTS = """
import resource
from qpeft_ext.utils.memory import keep_freed_memory
keep_freed_memory()
def take():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytearray(16 << 20) for _ in range(5)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
take()
print(take())
"""


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@glibc
@pytest.mark.parametrize("own", [False, True])
def test_freed_memory_is_kept_for_the_next_tensors_unless_the_environment_says_what_is_kept(own):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    env |= {"MALLOC_TRIM_THRESHOLD_": "65536"} if own else {}
    run = subprocess.run([sys.executable, "-c", FAULTS], env=env, capture_output=True, text=True, check=True)
    pages = (80 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert int(run.stdout) > pages / 2 if own else int(run.stdout) < pages / 10


@glibc
def test_gaps_between_what_is_kept_are_given_back():
    blocks = [torch.ones(60_000 // 4) for _ in range(4000)]  # 240 MB, below the size that has pages of its own
    kept = blocks[::100]
    del blocks
    held = resident_bytes()
    return_freed_memory(1 << 40)
    assert resident_bytes() > held - (20 << 20)  # so much is not free
    time.sleep(0.1)
    return_freed_memory(share=1e-6)  # its time is used up by the call before, for long
    assert resident_bytes() > held - (20 << 20)
    return_freed_memory()
    assert resident_bytes() < held - (150 << 20)
    assert all(bool((block == 1).all()) for block in kept)


@pytest.mark.parametrize("numel", [0, 1, 3 << 20, 9 << 20])
def test_tensors_in_large_pages_are_the_tensors_that_were_given(numel):
    """A tensor may have any size, and may begin and end in the middle of a page."""
    block = torch.zeros(numel + 7)
    tensor = block[3 : 3 + numel]
    assert in_large_pages(tensor) is tensor
    tensor.fill_(1)
    assert float(block.sum()) == numel


@pytest.mark.skipif(
    not LARGE_PAGES.is_file() or "[never]" in LARGE_PAGES.read_text(), reason="this system has no large pages"
)
def test_large_pages_are_few():
    def faults(prepare) -> int:
        tensor = prepare(torch.empty(48 << 18))  # 48 MB, which glibc takes from the system
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensor.fill_(1)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert min(faults(in_large_pages) for _ in range(3)) <= faults(lambda tensor: tensor)
