"""Freed memory that the C library keeps: passes of ever other sizes leave gaps in it, which a resident set counts."""

from __future__ import annotations

import contextlib
import ctypes

_LEAST = 64 << 20  # less is not worth the page faults


class _MallInfo2(ctypes.Structure):
    """``struct mallinfo2`` of glibc, in bytes but for the counts of blocks."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]


def return_freed_memory(least: int = _LEAST) -> None:
    """Give freed memory back to the system where the C library holds ``least`` bytes of it or more.

    Nothing happens without glibc 2.33 or later.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        library.mallinfo2.restype = _MallInfo2
        if library.mallinfo2().fordblks >= least:
            library.malloc_trim(0)
