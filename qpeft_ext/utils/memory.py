"""Work that does not fit in the device's memory, and freed memory of the host that the C library keeps.

glibc keeps freed memory, fragmented by passes of varying sizes, so that the process looks larger than it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")

_LEAST = 64 << 20  # less is not worth the page faults
_REFUSED = ("could not create a primitive", "could not execute a primitive")
# our operators allocate through torch's stable interface, which tells of a failure nothing but the name of the call
_ALLOCATIONS = ('"aten::new_empty"', '"aten::new_zeros"', '"aten::contiguous"')
_NO_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "alloc_failed",  # cuBLAS, cuDNN
    "could not create a memory",  # oneDNN
    "can't start new thread",  # Python: there is no room for its stack
    "resource temporarily unavailable",  # C++: the same
    *_REFUSED,
)

_LARGE_PAGE, _MADV_HUGEPAGE = 2 << 20, 14  # of Linux
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h

_last_end, _last_seconds = -math.inf, 0.0  # of the last call that did something, by `time.monotonic`


class _MallInfo2(ctypes.Structure):
    """``struct mallinfo2`` of glibc; sizes are in bytes."""

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


@functools.cache
def keep_freed_memory() -> None:
    """Have the C library keep up to 128 MB of freed memory for the next tensors, for the rest of the process.

    By default glibc gives it back, and takes new pages, many times in a pass of an LM on a CPU; clearing these pages
    took up to a tenth of the time of a cold pass of SmolLM2-135M on a virtual machine. Nothing happens without glibc,
    or where the environment sets its thresholds (``MALLOC_TRIM_THRESHOLD_``, ``GLIBC_TUNABLES``, …).
    """
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        if library.mallopt(_M_MMAP_THRESHOLD, 32 << 20):  # the largest that it takes
            library.mallopt(_M_TRIM_THRESHOLD, 128 << 20)


def in_large_pages(tensor: Tensor) -> Tensor:
    """Ask the system for pages of 2 MB where a tensor of the host lies that nothing was written to yet.

    The first write to each page waits for the system: a prefix of SmolLM2-135M has 2,300 pages of 4 KB.

    Args:
        tensor: any; nothing happens for one on a device, below 4 MB, or on a system without such pages.
    Returns: the tensor.
    """
    nbytes = tensor.numel() * tensor.element_size()
    if tensor.device.type == "cpu" and nbytes >= 2 * _LARGE_PAGE and sys.platform == "linux":
        first = -(-tensor.data_ptr() // _LARGE_PAGE) * _LARGE_PAGE
        end = (tensor.data_ptr() + nbytes) // _LARGE_PAGE * _LARGE_PAGE
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_HUGEPAGE)
    return tensor


def return_freed_memory(least: int = _LEAST, share: float = 1.0) -> None:
    """Give freed memory back to the system if the C library keeps at least ``least`` bytes of it.

    Nothing happens without glibc 2.33 or later.

    Args:
        least: bytes that are worth the effort.
        share: largest share of the running time that such calls may take. Asking for the free bytes takes 10 ms in a
            fragmented heap, and returned pages must be mapped again; a call that comes too early does nothing.
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


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that the device or the host has no memory left.

    On the host torch has no type for it: its allocator, the C++ library and oneDNN raise a RuntimeError each, and so
    does Python for a thread that cannot be started. The system's own word for it is an OSError.
    """
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    failed_call = "api call failed" in text and any(name in text for name in _ALLOCATIONS)
    return failed_call or any(words in text for words in _NO_MEMORY)


def is_surely_out_of_memory(error: BaseException) -> bool:
    """Do as `is_out_of_memory`, without kernels that oneDNN refuses, which may have another reason, such as a dtype."""
    return is_out_of_memory(error) and not is_refused_kernel(error)


def raise_if_out_of_memory(error: BaseException) -> None:
    """Raise an error again that says that memory is short; for code that takes any other error for an answer."""
    if is_surely_out_of_memory(error):
        raise error


def is_refused_kernel(error: BaseException) -> bool:
    """Tell whether oneDNN could not make or run a kernel: for lack of memory, or since it once lacked it.

    It keeps a failure, and refuses the same kernel from then on, also when there is memory again.
    """
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _REFUSED)


def retry_with_less(work: Callable[[], Result], use_less: Callable[[], bool]) -> Result:
    """Return ``work()``, which is called again as long as memory is short (of the device or host) and less will do.

    Args:
        work: the computation. It reads how much it may do at once whenever it is called.
        use_less: lowers that; False if it is as low as it can be.
    Raises: the error of the last try (`is_out_of_memory`) if not even the least fits.
    """
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or not use_less():
                raise
        # the next try begins after the except clause: until then the error keeps the failed pass's tensors alive


def in_halves(
    work: Callable[[Sequence[Item]], Iterable[Result]], items: Sequence[Item], before_halving: Callable[[int], object]
) -> Iterator[Result]:
    """Yield the results of ``work(items)``, computed in halves where all at once do not fit in memory.

    Args:
        work: computes the results of some items, in their order.
        items: at least one.
        before_halving: called with the number of items that are computed at a time from here on.
    Raises: the error of the last try (`is_out_of_memory`) if a single item does not fit.
    """
    try:
        results: Iterable[Result] | None = work(items)
    except (RuntimeError, MemoryError) as error:
        if len(items) == 1 or not is_out_of_memory(error):
            raise
        results = None
    if results is not None:
        yield from results
        return
    half = len(items) // 2
    before_halving(half)
    for part in (items[:half], items[half:]):
        yield from in_halves(work, part, before_halving)
