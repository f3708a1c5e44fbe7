"""Check that a GGUF file is whole before a library reads it, which would take long or fail in many lines."""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_VERSIONS = (2, 3)
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of metadata values, by their type
_UINT16, _UINT32, _STRING, _ARRAY = 2, 4, 8, 9
_FLOAT16, _BFLOAT16 = 1, 30
_FLOATS = {0: torch.float32, _FLOAT16: torch.float16, _BFLOAT16: torch.bfloat16}  # types of tensors, not packed
_DAMAGED = "it was cut or is damaged; fetch the file again"


@dataclass(frozen=True)
class GgufHeader:
    """The facts of a GGUF file that decide how it is converted.

    Args:
        dtype: the dtype of its matrices; bfloat16 if any is packed.
        splitting: the name of the rule by which its tokenizer splits a text before it merges bytes; "" if it has none.
    """

    dtype: torch.dtype
    splitting: str


def read_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file, whatever is in it; this takes less than a second.

    Raises: ValueError for a file that is no GGUF file, has another version of the format, ends too early, or is one of
        several that an LM was split into.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError("the file does not start with GGUF, as every GGUF file does; name another file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Header(data).read()
            except (struct.error, OverflowError):
                raise ValueError(f"the header of the GGUF file cannot be read: {_DAMAGED}") from None


class _Header:
    """A header that is read from its start to its end. Methods raise struct.error where the file ends before."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.position = data, 4

    def read(self) -> GgufHeader:
        version, tensors, values = self._numbers("IQQ")
        if version not in _VERSIONS:
            raise ValueError(f"expected version 2 or 3 of the GGUF format, got {version}; convert the file again")
        alignment, splitting, files = 32, b"", 1
        for _ in range(values):
            key = self._text()
            (kind,) = self._numbers("I")
            if key == b"general.alignment" and kind == _UINT32:
                (alignment,) = self._numbers("I")
            elif key == b"split.count" and kind == _UINT16:
                (files,) = self._numbers("H")
            elif key == b"tokenizer.ggml.pre" and kind == _STRING:
                splitting = self._text()
            else:
                self._skip_value(kind)
        if files > 1:  # transformers would read this one only
            raise ValueError(
                f"the GGUF file is one of {files} that its LM was split into; make one file of them with llama.cpp: "
                "llama-gguf-split --merge FIRST-FILE WHOLE-FILE"
            )
        if not tensors:
            raise ValueError(f"the GGUF file has no tensors: {_DAMAGED}")
        kinds, ends = zip(*self._tensors(tensors), strict=True)
        start = math.ceil(self.position / max(alignment, 1)) * alignment
        if start + max(ends) > len(self.data):
            raise ValueError(f"the GGUF file has {len(self.data)} bytes of {start + max(ends)}: {_DAMAGED}")
        return GgufHeader(_dtype(set(kinds)), splitting.decode(errors="replace"))

    def _tensors(self, count: int) -> Iterator[tuple[int, int]]:
        """Yield the type of each tensor, and where its bytes end, counted from the start of the first one."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        for _ in range(count):
            self._text()
            (dimensions,) = self._numbers("I")
            if dimensions > 8:
                raise struct.error
            *shape, kind, offset = self._numbers(f"{dimensions}QIQ")
            try:
                values, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            except (ValueError, KeyError):
                raise ValueError(f"the GGUF file has a tensor of type {kind}, which this gguf package does not know; "
                                 "upgrade it: pip install -U gguf") from None  # fmt: skip
            yield kind, offset + math.ceil(math.prod(shape) / values) * nbytes

    def _skip_value(self, kind: int) -> None:
        if kind == _STRING:
            self._text()
        elif kind == _ARRAY:
            items, count = self._numbers("IQ")
            if items in _WIDTHS:
                self._move(count * _WIDTHS[items])
            elif items == _STRING:
                for _ in range(count):
                    self._text()
            else:
                raise struct.error
        elif kind in _WIDTHS:
            self._move(_WIDTHS[kind])
        else:
            raise struct.error

    def _text(self) -> bytes:
        (length,) = self._numbers("Q")
        start = self.position
        self._move(length)
        return self.data[start : self.position]

    def _numbers(self, layout: str) -> tuple[int, ...]:
        numbers = struct.unpack_from(f"<{layout}", self.data, self.position)
        self.position += struct.calcsize(f"<{layout}")
        return numbers

    def _move(self, count: int) -> None:
        self.position += count
        if self.position > len(self.data):
            raise struct.error


def _dtype(kinds: set[int]) -> torch.dtype:
    """Return the dtype of matrices whose tensors have these types; norms beside half-precision matrices are float32."""
    if not kinds <= _FLOATS.keys():
        return torch.bfloat16
    return next((_FLOATS[kind] for kind in (_BFLOAT16, _FLOAT16) if kind in kinds), torch.float32)
