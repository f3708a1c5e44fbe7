"""`Collection`, the interface to a data set of any format, and `Glance`, by which a format is recognised."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ..utils.files import AnyPath
from .io import check_kept, open_bytes, read_lines, reading
from .json_records import read_records
from .trec import Qrels, Run

PARTS = ("corpus", "queries", "answers", "qrels", "candidates", "examples")
Example = dict[str, Any]  # "query_id"?, "query", "positives", "negatives"
_GLANCE = 1 << 16  # bytes; enough for the first line of a tsv


class Collection:
    """A data set with some of the six `PARTS`; asking for another is a ValueError that lists those it has.

    A format is a subclass in a file of its own, which recognises its files.

    Args:
        place: The folder, file or id of the data set.

    Attributes:
        format: Name of the format.
        looks_for: How the format is recognised, for an error message.
        parts: Those of `PARTS` that the data set has.
        splits: Names of its splits; empty for one unnamed set.
        corpus: doc_id → {"id", "title", "text"}, read from disk document by document.
        left_out: What reading has left out, in words → how many.
    """

    format: ClassVar[str] = ""
    looks_for: ClassVar[str] = ""

    def __init__(self, place: AnyPath) -> None:
        self.place = os.fspath(place)
        self.left_out: dict[str, int] = {}

    @classmethod
    def recognises(cls, glance: Glance) -> bool:
        """Return True if a file or folder is of this format.

        Args:
            glance: The first line or record of the file, or the names in the folder.
        """
        raise NotImplementedError

    @property
    def parts(self) -> tuple[str, ...]:
        raise NotImplementedError

    def has(self, part: str, split: str | None = None) -> bool:
        """Return True if the data set has a part.

        Args:
            part: One of `PARTS`.
            split: Name of the split; None for the default one.
        """
        return part in self.parts and (not self.splits or (split or self.default_split()) in self.splits)

    @property
    def splits(self) -> list[str]:
        return []

    def default_split(self) -> str | None:
        """Return "test" or the only split; None if there is neither."""
        there = self.splits
        return "test" if "test" in there else there[0] if len(there) == 1 else None

    @property
    def corpus(self) -> Mapping[str, dict]:
        raise self.lacks("corpus")

    def queries(self, split: str | None = None) -> dict[str, str]:
        """Return query_id → text.

        Args:
            split: Name of the split; None for the default one.
        """
        raise self.lacks("queries")

    def answers(self, split: str | None = None) -> dict[str, list[str]]:
        """Return query_id → short answers, for open-domain questions.

        Args:
            split: Name of the split; None for the default one.
        """
        raise self.lacks("answers")

    def qrels(self, split: str | None = None) -> Qrels:
        """Return query_id → doc_id → relevance.

        Args:
            split: Name of the split; None for the default one.
        """
        raise self.lacks("qrels")

    def judge(self, split: str | None, runs: Sequence[Run]) -> Qrels | None:
        """Return qrels to evaluate runs with; None if the data set judges nothing.

        Args:
            split: Name of the split; None for the default one.
            runs: The runs, whose passages are judged by the answers where a data set has no qrels.
        """
        return self.qrels(split) if self.has("qrels", split) else None

    def candidates(self, split: str | None = None) -> Run:
        """Return the run of a first stage: query_id → (doc_id, score), best first.

        Args:
            split: Name of the split; None for the default one.
        """
        raise self.lacks("candidates")

    def examples(self, split: str | None = None) -> Iterator[Example]:
        """Yield training examples {"query_id"?, "query", "positives", "negatives"}, read one by one.

        Args:
            split: Name of the split; None for the default one.
        """
        raise self.lacks("examples")

    def lacks(self, part: str) -> ValueError:
        """Return the error for a part that the data set does not have.

        Args:
            part: One of `PARTS`.
        """
        there = ", ".join(self.parts) or "nothing"
        return ValueError(f"{self.place} ({self.format}) holds no {part}; it holds {there}")

    def choose_split(self, split: str | None) -> str:
        """Return the name of an existing split.

        Args:
            split: A name, which is returned; None for `default_split`.

        Raises:
            ValueError: If there is no such split, or no default one; the message lists all.
        """
        there = self.splits
        if split is None:
            if default := self.default_split():
                return default
            raise ValueError(f"{self.place} ({self.format}): which split? there are: {', '.join(there) or 'none'}")
        if split not in there:
            raise ValueError(
                f"{self.place} ({self.format}) has no split {split!r}; there are: {', '.join(there) or 'none'}"
            )
        return split

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.place!r}, {', '.join(self.parts)})"


class Glance:
    """The beginning of a file, or the names in a folder.

    Attributes:
        record: the first JSON object of the file.
        columns: the first line of another file, cut at tabs.
        error: why it has neither.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_folder = path.is_dir()
        self.record: dict[str, Any] | None = None
        self.columns: list[str] = []
        self.error: ValueError | None = None
        if not self.is_folder:
            try:
                self._look()
            except ValueError as error:
                self.error = error

    def _look(self) -> None:
        with open_bytes(check_kept(self.path, "a data set")) as file, reading(self.path):
            start = file.read(_GLANCE)
        if start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"[", b"{"):
            for key in (
                "question",
                "query",
                "_id",
            ):  # a key of its records tells an object of them from a record
                _, name, self.record = next(read_records(self.path, key), (0, None, None))
                if name is not None:
                    return
        else:
            _, line = next(read_lines(self.path), (0, ""))
            self.columns = line.split("\t")

    def has(self, *keys: str) -> bool:
        """Return True if the first record has one of ``keys``."""
        return self.record is not None and any(key in self.record for key in keys)

    def holds(self, *names: str) -> Path | None:
        """Return the first of the files ``names``, plain or .gz, that is in the folder."""
        return next(
            (
                file
                for name in names
                for file in (self.path / name, self.path / f"{name}.gz")
                if self.is_folder and file.is_file()
            ),
            None,
        )


def plain_name(path: Path) -> str:
    """Return the name of a file without .gz."""
    return path.name.removesuffix(".gz")
