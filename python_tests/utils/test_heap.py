"""Freed memory goes back to the system."""

import ctypes
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from qpeft_ext.utils.memory import return_freed_memory


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not (sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallinfo2")), reason="not glibc")
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
