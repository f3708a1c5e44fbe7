"""Freed memory that the C library keeps: passes of ever other sizes leave gaps in it, which a resident set counts."""

from __future__ import annotations

import contextlib
import ctypes
import math
import time

_LEAST = 64 << 20  # less is not worth the page faults

_last_end, _last_seconds = -math.inf, 0.0  # of the last call that did something, by `time.monotonic`


class _MallInfo2(ctypes.Structure):
    """``struct mallinfo2`` of glibc, in bytes but for the counts of blocks."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def return_freed_memory(least: int = _LEAST, share: float = 1.0) -> None:
    """Give freed memory back to the system where the C library holds ``least`` bytes of it or more.

    share: of the time that such calls may take. To ask what is free takes 10 ms where there are many gaps, and pages
    that are given back must be mapped again; a call that comes too early for that share does nothing.
    Nothing happens without glibc 2.33 or later.
    """
    global _last_end, _last_seconds
    started = time.monotonic()
    if started - _last_end < _last_seconds * (1 / share - 1):
        return
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        library.mallinfo2.restype = _MallInfo2
        if library.mallinfo2().fordblks >= least:
            library.malloc_trim(0)
    _last_end = time.monotonic()
    _last_seconds = _last_end - started
