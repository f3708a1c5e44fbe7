"""TREC runs (``query_id Q0 doc_id rank score tag``), plain or .gz; `qrels` reads the judgements."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..utils.files import AnyPath
from ..utils.partial_file import ResultWriter
from ..utils.text import shorten
from .io import BYTE_ORDER_MARK, expect_no_mark, line_error, read_lines

Run = dict[str, list[tuple[str, float]]]  # query_id → (doc_id, score), best first
Qrels = dict[str, dict[str, int]]  # query_id → doc_id → relevance

_SPACE = re.compile(r"[ \t\n\r\f\v]+")  # space for trec_eval; other blanks may be part of an id
_INTEGER = re.compile(r"([+-]?[0-9]{1,18})(?:\.0*)?")  # tables of numbers write 1 as "1.0"
_LOWEST = np.float32(-np.inf)


def read_run(path: AnyPath) -> Run:
    """Read a TREC run.

    Candidates are ordered as trec_eval orders them, by score; equal scores by the rank column and then by doc_id. The
    first rank and the tag may be any.

    Args:
        path: The run, plain or .gz.

    Returns:
        query_id → [(doc_id, score), …], best first; queries in the order of the file.

    Raises:
        ValueError: For a bad line; the message names file and line.
    """
    rows: dict[str, dict[str, tuple[float, int]]] = {}
    for number, text in read_lines(path, "a TREC run"):
        expect_no_mark(path, number, text)
        columns = _columns(path, number, text)
        query_id, _, doc_id, rank, score, _ = columns
        candidates = rows.setdefault(query_id, {})
        if doc_id in candidates:
            raise line_error(path, number, f"document {doc_id!r} occurs twice for query {query_id!r}; remove one line")
        candidates[doc_id] = (_score(path, number, score), whole_number(path, number, "rank", rank))
    if not rows:
        raise ValueError(f"{path}: the run is empty; expected lines 'query_id Q0 doc_id rank score tag'")
    return {
        query_id: [
            (doc_id, score)
            for doc_id, (score, _) in sorted(candidates.items(), key=lambda item: (-item[1][0], item[1][1], item[0]))
        ]
        for query_id, candidates in rows.items()
    }


def decreasing_scores(scores: Sequence[float]) -> list[float]:
    """Return the scores of a ranking, lowered where needed so that they strictly decrease *as float32*.

    trec_eval reads float32 and orders equal scores by doc_id, so two scores that differ only in float64 would be read
    in another order than they were written.

    Args:
        scores: scores, best first.

    Raises: ValueError if a score is not finite as float32, or is larger than the one before it.
    """
    lowered: list[float] = []
    last: np.float32 | None = None
    for rank, score in enumerate(scores, start=1):
        with np.errstate(over="ignore"):
            value = np.float32(score)
        if not np.isfinite(value):
            raise ValueError(f"the score at rank {rank} is {score}, which is not a finite float32")
        if rank > 1 and score > scores[rank - 2]:
            raise ValueError(f"the score at rank {rank}, {score}, is larger than the one before it, {scores[rank - 2]}")
        if last is not None and value >= last:
            with np.errstate(over="ignore"):
                value = np.nextafter(last, _LOWEST)
            if not np.isfinite(value):
                raise ValueError(f"the score at rank {rank} cannot be lowered to a finite float32 any more")
        lowered.append(float(value))
        last = value
    return lowered


def written_ranking(query_id: str, ranking: Iterable[tuple[str, float]]) -> list[tuple[str, float]]:
    """Return a ranking as it is written: best first (equal scores in the given order), with `decreasing_scores`.

    Raises: ValueError for an id with white space, a document that occurs twice, a score that is not finite.
    """
    check_id("query_id", query_id)
    ranking = list(ranking)
    for doc_id, score in ranking:
        check_id("doc_id", doc_id)
        if not math.isfinite(score):
            raise ValueError(f"query {query_id!r}, document {doc_id!r}: scores must be finite, got {score}")
    if (twice := _twice(ranking)) is not None:
        raise ValueError(f"document {twice!r} occurs twice for query {query_id!r}; rank each document once")
    ranking.sort(key=lambda candidate: -candidate[1])  # stable
    try:
        scores = decreasing_scores([score for _, score in ranking])
    except ValueError as error:
        raise ValueError(f"query {query_id!r}: {error}") from None
    return [(doc_id, score) for (doc_id, _), score in zip(ranking, scores, strict=True)]


def expect_each_once(run: Run, what: str) -> None:
    """Check that no ranking has a document twice, of which one would count only, or both.

    Args:
        run: query_id -> [(doc_id, score)].
        what: is done with the run, for the message.

    Raises: ValueError naming query and document.
    """
    for query_id, ranking in run.items():
        if (twice := _twice(ranking)) is not None:
            raise ValueError(f"{what}: document {twice!r} occurs twice for query {query_id!r}; rank each document once")


def _twice(ranking: Sequence[tuple[str, float]]) -> str | None:
    """Return a document that a ranking has twice; None if there is none."""
    if len({doc_id for doc_id, _ in ranking}) == len(ranking):
        return None
    return next(d for i, (d, _) in enumerate(ranking) if d in {e for e, _ in ranking[:i]})


def run_lines(query_id: str, ranking: Sequence[tuple[str, float]], tag: str) -> bytes:
    """Return the lines of one query, whose ranking is a `written_ranking`."""
    return "".join(
        f"{query_id} Q0 {doc_id} {rank} {np.float32(score)!s} {tag}\n"
        for rank, (doc_id, score) in enumerate(ranking, start=1)
    ).encode("utf-8")


class RunWriter:
    """Writer of a TREC run, query by query; the file appears under its name when it is complete, or never.

        with RunWriter("run.trec") as writer:
            for query_id, ranking in rankings:
                writer.add(query_id, ranking)

    Args:
        path: plain, or .gz by its name.
        tag: last column, the name of the system.
    """

    def __init__(self, path: AnyPath, tag: str = "qpeft_ext") -> None:
        check_id("the tag", tag)
        self.tag = tag
        self.num_lines = 0
        self._queries: set[str] = set()
        self._file = ResultWriter(path)

    def add(self, query_id: str, ranking: Iterable[tuple[str, float]]) -> int:
        """Append one query.

        Args:
            query_id: Id of the query.
            ranking: (doc_id, score); sorted here by score, and equal scores keep the given order.

        Returns:
            How many lines were written; an empty ranking writes none.

        Raises:
            ValueError: For a repeated query or document, an id with white space, or a score that is not finite.
        """
        if query_id in self._queries:
            raise ValueError(f"query {query_id!r} is already in the run; write each query once")
        ranking = written_ranking(query_id, ranking)
        self._file.write(run_lines(query_id, ranking, self.tag))
        self._queries.add(query_id)
        self.num_lines += len(ranking)
        return len(ranking)

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._file.__exit__(kind, error, trace)


def write_run(path: AnyPath, run: Mapping[str, Iterable[tuple[str, float]]], tag: str = "qpeft_ext") -> int:
    """Write a whole run, as `RunWriter` does.

    Args:
        path: The file to write; .gz by its name.
        run: query_id → (doc_id, score).
        tag: Last column, the name of the system.

    Returns:
        The number of lines.
    """
    with RunWriter(path, tag) as writer:
        for query_id, ranking in run.items():
            writer.add(query_id, ranking)
    return writer.num_lines


def without_identical_ids(run: Mapping[str, Sequence[tuple[str, float]]]) -> tuple[Run, int]:
    """Remove the documents that have the id of their query: where queries are documents, they would find themselves.

    Examples are ArguAna and Quora.

    Args:
        run: query_id → (doc_id, score).

    Returns:
        The run with every query, and how many candidates were removed.
    """
    kept = {
        query_id: [candidate for candidate in ranking if candidate[0] != query_id] for query_id, ranking in run.items()
    }
    return kept, sum(map(len, run.values())) - sum(map(len, kept.values()))


def find_line(path: AnyPath, query_id: str, doc_id: str | None = None) -> int | None:
    """Return the line of a run that names ``query_id`` (and ``doc_id``), for an error message; None in a pipe."""
    for number, text in read_lines(path) if Path(path).is_file() else ():
        columns = split_columns(text)
        if columns[0] == query_id and (doc_id is None or columns[2] == doc_id):
            return number
    return None


def split_columns(text: str) -> list[str]:
    """Return the columns of a line: cut at tabs if there are any, so that ids may contain blanks, else at white space.

    Where both give the same number of columns, blanks beside a tab belong to no id.
    """
    spaced = _SPACE.split(text.strip(" \t\r\n\f\v"))
    tabbed = text.split("\t")
    return tabbed if 2 < len(tabbed) != len(spaced) else spaced


def _columns(path: AnyPath, number: int, text: str) -> list[str]:
    columns = split_columns(text)
    if len(columns) != 6 or not all(columns):
        hint = "; an id with blanks needs tabs between the columns" if len(columns) > 6 else ""
        raise line_error(
            path,
            number,
            f"expected 6 columns 'query_id Q0 doc_id rank score tag', got {len(columns)}: {shorten(text)}{hint}",
        )
    return columns


def whole_number(path: AnyPath, number: int, name: str, text: str) -> int:
    """Return a whole number that is written as 1 or 1.0. Raises: ValueError naming file and line."""
    found = _INTEGER.fullmatch(text.strip())
    if not found:
        raise line_error(path, number, f"expected a whole number as {name}, got {shorten(text)}")
    return int(found[1])


def _score(path: AnyPath, number: int, text: str) -> float:
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    with np.errstate(over="ignore"):
        if "_" in text or not text.isascii() or not np.isfinite(np.float32(score)):
            raise line_error(path, number, f"expected a finite number as score, got {shorten(text)}")
    return score


def check_id(name: str, value: str) -> None:
    """Raises: ValueError for an id (or tag) that would not be one column of a run."""
    if not isinstance(value, str) or not value or _SPACE.search(value) or "\0" in value:
        what = "zero bytes" if isinstance(value, str) and "\0" in value else "white space"
        raise ValueError(f"{name} must be text without {what} in a TREC run, got {value!r}")
    if value.startswith(BYTE_ORDER_MARK) and name.endswith("query_id"):  # at the start of a line, where it is dropped
        raise ValueError(f"{name} must not begin with a byte order mark in a TREC run, got {value!r}; remove the mark")


def system_name(path: Path) -> str:
    """Return a short name for a run file: its name without the endings of formats."""
    name = path.name.removesuffix(".gz")
    for ending in (".trec", ".txt", ".run", ".tsv"):
        name = name.removesuffix(ending) or name
    return name
