"""The survey of a corpus: how much of it an index has, and how much the rest takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Survey:
    """How much of a corpus is in an index, and how much is missing.

    Attributes:
        documents: in the corpus.
        passages: how many prefixes they make: as many as documents, unless these are split.
        distinct: different prefixes among these.
        there: prefixes that are in the index already.
        nbytes: bytes that the missing prefixes take.
        cut: documents cut to max_document_tokens.
    """

    documents: int
    passages: int
    distinct: int
    there: int
    nbytes: int
    cut: int

    @property
    def missing(self) -> int:
        return self.distinct - self.there


def size(nbytes: float) -> str:
    """A number of bytes with a unit, such as 1.5 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
