"""`Collection`: the one interface to a data set, whatever its format, and how a format is recognised."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ..utils.files import AnyPath
from .io import check_file, open_bytes, read_lines, reading
from .json_records import read_records
from .trec import Qrels, Run

PARTS = ("corpus", "queries", "answers", "qrels", "candidates", "examples")
Example = dict[str, Any]  # "query_id"?, "query", "positives", "negatives"
_GLANCE = 1 << 16  # bytes; enough for the first line of a tsv


class Collection:
    """A data set: some of the six `PARTS`. Asking for one that it does not hold is a ValueError that says so.

    corpus: Mapping doc_id → {"id", "title", "text"}, read from disk document by document.
    queries(split): query_id → text.  answers(split): query_id → short answers, for open-domain questions.
    qrels(split): query_id → doc_id → relevance.  candidates(split): a first stage's run.
    examples(split): training examples, streamed: {"query_id"?, "query", "positives", "negatives"}.
    splits: the names that can be asked for; [] where there is one unnamed set. parts: what is there.

    A format is a subclass in a file of its own that names what it looks for and recognises it.
    """

    format: ClassVar[str] = ""
    looks_for: ClassVar[str] = ""  # for the error that nothing fits

    def __init__(self, place: AnyPath) -> None:
        self.place = os.fspath(place)
        self.left_out: dict[str, int] = {}  # what reading left out, in words -> how many

    @classmethod
    def recognises(cls, glance: Glance) -> bool:
        raise NotImplementedError

    @property
    def parts(self) -> tuple[str, ...]:
        raise NotImplementedError

    def has(self, part: str, split: str | None = None) -> bool:
        """Whether it holds the part, for that split; None: for the one that is chosen without a name."""
        return part in self.parts and (not self.splits or (split or self.default_split()) in self.splits)

    @property
    def splits(self) -> list[str]:
        return []

    def default_split(self) -> str | None:
        """ "test", or the only split there is; None where neither is so."""
        there = self.splits
        return "test" if "test" in there else there[0] if len(there) == 1 else None

    @property
    def corpus(self) -> Mapping[str, dict]:
        raise self.lacks("corpus")

    def queries(self, split: str | None = None) -> dict[str, str]:
        raise self.lacks("queries")

    def answers(self, split: str | None = None) -> dict[str, list[str]]:
        raise self.lacks("answers")

    def qrels(self, split: str | None = None) -> Qrels:
        raise self.lacks("qrels")

    def judge(self, split: str | None, runs: Sequence[Run]) -> Qrels | None:
        """Qrels to evaluate ``runs`` with; None where nothing is judged. Question sets judge the runs' own passages."""
        return self.qrels(split) if self.has("qrels", split) else None

    def candidates(self, split: str | None = None) -> Run:
        raise self.lacks("candidates")

    def examples(self, split: str | None = None) -> Iterator[Example]:
        raise self.lacks("examples")

    def lacks(self, part: str) -> ValueError:
        there = ", ".join(self.parts) or "nothing"
        return ValueError(f"{self.place} ({self.format}) holds no {part}; it holds {there}")

    def choose_split(self, split: str | None) -> str:
        """``split`` if there is one of that name; without one asked for, `default_split`."""
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
    """What can be seen of a file or folder at once.

    record: the first JSON object.  columns: the first line of another file, cut at tabs.  error: why it shows neither.
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
        with open_bytes(check_file(self.path)) as file, reading(self.path):
            start = file.read(_GLANCE)
        if start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"[", b"{"):
            for key in ("question", "query", "_id"):  # of an object of records; the rest look the same with any of them
                _, name, self.record = next(read_records(self.path, key), (0, None, None))
                if name is not None:
                    return
        else:
            _, line = next(read_lines(self.path), (0, ""))
            self.columns = line.split("\t")

    def has(self, *keys: str) -> bool:
        """Whether the first record has one of ``keys``."""
        return self.record is not None and any(key in self.record for key in keys)

    def holds(self, *names: str) -> Path | None:
        """The first of ``names``, plain or .gz, in the folder."""
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
    """The name of a file without .gz."""
    return path.name.removesuffix(".gz")
