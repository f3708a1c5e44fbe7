"""Document prefixes on disk: safetensors files that hold one flat tensor a prefix, each with a checksum.

The disk tier of `DocumentCache` writes one prefix a file, `qpeft index` many. A file appears whole or not at all; what
is damaged later is found by the checksum when it is read, so a wrong score is never the result.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..utils.files import AtomicWriter
from ..utils.small_files import open_regular

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int8: "I8"}
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}
_MAX_HEADER = 16 << 20  # bytes; that of a shard with the most prefixes takes 10 MB
_BLOCK = 512  # 8-byte words in a block of the checksum


class Damaged(ValueError):
    """A file, or a prefix in it, is not what was written."""


class Extent(NamedTuple):
    """The bytes of a file that hold a prefix, ``offset`` to ``offset + nbytes``, and their checksum.

    format: that of the file, which says how the checksum is computed.
    dtype: of the numbers.
    """

    path: Path
    offset: int
    nbytes: int
    checksum: int
    format: str
    dtype: torch.dtype | None


@dataclass
class Contents:
    """The content of a file according to its header.

    Attributes:
        extents: name -> where the prefix is, in the order of the file.
        metadata: the writer's.
        nbytes: size of the file.
        format: a key of `CHECKSUMS`.
        dtype: of all prefixes; None where there is none.
    """

    extents: dict[str, Extent]
    metadata: dict[str, str]
    nbytes: int
    format: str
    dtype: torch.dtype | None


def write_prefixes(
    path: Path, prefixes: Sequence[tuple[str, Tensor]], metadata: dict[str, str], mode: int = 0o666
) -> int:
    """Write prefixes to a new file, which appears when it is complete and synced.

    Args:
        path: the file.
        prefixes: name and flat tensor (`PrefixKV.flat`, on the CPU) of each.
        metadata: strings to store in the header.
        mode: permissions, before the umask.
    Returns: the size of the file in bytes.
    Raises: OSError if it cannot be written; nothing is left then.
    """
    parts = [_bytes(flat) for _, flat in prefixes]
    header: dict = {
        "__metadata__": {
            **metadata,
            "format": FORMAT,
            "checksums": " ".join(f"{checksum(part):08x}" for part in parts),
        }
    }
    start = 0
    for (name, flat), part in zip(prefixes, parts, strict=True):
        header[name] = {
            "dtype": _DTYPES[flat.dtype],
            "shape": [flat.numel()],
            "data_offsets": [start, start + len(part)],
        }
        start += len(part)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with AtomicWriter(path, mode, follow=False) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for part in parts:
            file.write(part)
    return 8 + len(text) + start


def header_bytes(prefixes: int) -> int:
    """About the length of a header with so many prefixes, in bytes."""
    return 600 + 160 * prefixes


def read_contents(path: Path) -> Contents:
    """Read the header of a file. Raises: `Damaged`, or OSError if the file cannot be read."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise Damaged("cut short")
            if length > _MAX_HEADER:
                raise Damaged(f"a header of {length:,} bytes")
            header = json.loads(file.read(length))  # as fast as it can be: a shard has up to 65,536 entries
            metadata = header.pop("__metadata__")
            format = metadata["format"]
            if format not in CHECKSUMS:
                raise Damaged(f"expected the format {FORMAT!r}, got {str(format)[:60]!r}")
            checksums = [int(text, 16) for text in metadata["checksums"].split()]
            if not all(0 <= checksum < 1 << 32 for checksum in checksums):
                raise Damaged("a checksum of more than 32 bits")
            dtypes = {_TORCH_DTYPES[entry["dtype"]] for entry in header.values()}
            if len(dtypes) > 1:
                raise Damaged("prefixes of several dtypes")
            dtype = dtypes.pop() if dtypes else None
            extents, end = {}, 0
            for (name, entry), expected in zip(header.items(), checksums, strict=True):
                start, (begin, end) = end, entry["data_offsets"]
                if begin != start or type(end) is not int or not start <= end <= size:
                    raise Damaged(f"{name[:64]!r} is not where it must be")
                extents[name] = Extent(path, 8 + length + start, end - start, expected, format, dtype)
        except Damaged:
            raise
        except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Damaged(f"not a readable header ({type(error).__name__})") from None
        if size != 8 + length + end:
            raise Damaged(f"expected {8 + length + end} bytes, got {size}")
    return Contents(extents, metadata, size, format, dtype)


def read_prefix(extent: Extent, into: Tensor) -> None:
    """Read a prefix into memory of the CPU, uint8 [nbytes].

    That is one copy, from the page cache. It was twice as fast as reading through a memory map, and a file that is cut
    short while it is read is an error, not a bus error.

    Raises: `Damaged`, or OSError if the file cannot be read.
    """
    view = into.numpy().data
    with open_regular(extent.path, buffering=0) as file:
        done = 0
        while done < extent.nbytes:
            count = os.preadv(file.fileno(), [view[done:]], extent.offset + done)
            if not count:
                raise Damaged("cut short")
            done += count
    if CHECKSUMS[extent.format](view) != extent.checksum:
        raise Damaged("wrong checksum")


def prefetch(path: Path, offset: int = 0, nbytes: int = 0) -> None:
    """Ask the system to read a part of a file into its page cache, without waiting.

    nbytes: how much; 0: to the end of the file.
    """
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError, ValueError), open_regular(path, buffering=0) as file:  # reading will say why
            os.posix_fadvise(file.fileno(), offset, nbytes, os.POSIX_FADV_WILLNEED)


def checksum(data: memoryview) -> int:
    """CRC-32 of sums of 8-byte words (mod 2^64), and of the bytes after the last whole block of 4 KiB.

    The words are a table with a row for each block. The sums of its rows change when a word moves to another block, the
    sums of its columns when it moves within one. They are computed at the speed of the memory, unlike a CRC of every
    byte.
    """
    table, rest = _table_of_words(data)
    return zlib.crc32(rest, zlib.crc32(table.sum(axis=0).data, zlib.crc32(table.sum(axis=1).data)))


def _checksum_1(data: memoryview) -> int:
    """The checksum of files that earlier versions wrote: the sums of the rows alone."""
    table, rest = _table_of_words(data)
    return zlib.crc32(rest, zlib.crc32(table.sum(axis=1).data))


def _table_of_words(data: memoryview) -> tuple[np.ndarray, memoryview]:
    """The whole blocks of ``data``, uint64 [blocks, words of a block], and the bytes after them."""
    content = np.frombuffer(data, dtype=np.uint8)
    whole = len(content) // (8 * _BLOCK) * 8 * _BLOCK
    return content[:whole].view(np.uint64).reshape(-1, _BLOCK), content[whole:].data


FORMAT = "qpeft_ext prefixes 2"  # what is written
CHECKSUMS = {"qpeft_ext prefixes 1": _checksum_1, FORMAT: checksum}  # what is read


def _bytes(flat: Tensor) -> memoryview:
    return flat.contiguous().view(torch.uint8).numpy().data
