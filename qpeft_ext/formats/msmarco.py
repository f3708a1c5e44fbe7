"""MS MARCO passages, as the tab-separated files it comes in, plain or .gz.

collection.tsv         pid, passage
queries.<split>.tsv    qid, query
qrels.<split>.tsv      qid, 0, pid, relevance
top1000.<split>        qid, pid, query, passage
triples.<split>.tsv    query, positive, negative: texts; qidpidtriples.<split>.tsv: the same by ids
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ..utils.files import AnyPath
from ..utils.text import shorten
from . import corpus
from .collection import Collection, Glance, plain_name
from .io import expect_no_mark, line_error, read_lines
from .jsonl import Example
from .qrels import read_table
from .trec import Qrels, Run

_QRELS = ("qrels.{}.tsv", "qrels.{}.txt", "qrels.{}")
_TOP = ("top1000.{}", "top1000.{}.tsv", "top1000.{}.txt")
_TRIPLES = ("triples.{}.tsv", "triples.{}", "qidpidtriples.{}.tsv", "qidpidtriples.{}")
_SPLIT = re.compile(r"(?:queries|qrels|top1000|triples|qidpidtriples)\.(.+?)(?:\.tsv|\.txt)?$")
# names of columns on a first line, which the official files do not have
_HEADERS = {
    (name, text)
    for name in ("qid", "pid", "query_id", "query-id", "doc_id", "docid", "id")
    for text in ("query", "passage", "text")
}


class MsmarcoCorpus(corpus.FileCorpus):
    """``collection.tsv``: pid, passage. There are no titles."""

    format = "msmarco"
    expected = "lines pid <tab> passage"

    def parse(self, number: int, text: str) -> corpus.Document | None:
        expect_no_mark(self.path, number, text)
        doc_id, passage = _columns(self.path, number, text.rstrip("\r\n"), "pid", "passage", empty="passage")
        if number == 1 and (doc_id.lower(), passage.lower()) in _HEADERS:
            return None
        return {"id": doc_id, "title": "", "text": passage}


class TopCorpus(corpus.FileCorpus):
    """The passages of a ``top1000`` file, where there is no collection."""

    format = "msmarco_top"
    expected = "lines qid <tab> pid <tab> query <tab> passage"
    by_lines = False

    def documents(self) -> Iterator[tuple[int, corpus.Document]]:
        for number, _, doc_id, _, passage in _top_lines(self.path):
            yield number, {"id": doc_id, "title": "", "text": passage}


class Folder(Collection):
    """A folder with some of the files; "splits" are the names between the dots, such as ``dev.small``."""

    format = "msmarco"
    looks_for = "a folder with collection.tsv or top1000.* (MS MARCO)"

    @classmethod
    def recognises(cls, glance: Glance) -> bool:
        return glance.is_folder and bool(glance.holds("collection.tsv") or _tops(glance.path))

    @property
    def parts(self) -> tuple[str, ...]:
        there = {plain_name(file).partition(".")[0] for file in _files(self.place)}
        names = {
            "corpus": {"collection", "top1000"},
            "queries": {"queries", "top1000"},
            "qrels": {"qrels"},
            "candidates": {"top1000"},
            "examples": {"triples", "qidpidtriples"},
        }
        return tuple(part for part, files in names.items() if files & there)

    def has(self, part: str, split: str | None = None) -> bool:
        files = {"qrels": _QRELS, "candidates": _TOP, "examples": _TRIPLES}.get(part)
        there = super().has(part, split) or part == "corpus" and part in self.parts
        name = split or self.default_split()
        return there and (files is None or self._find(*(file.format(name) for file in files)) is not None)

    @property
    def splits(self) -> list[str]:
        return sorted({found[1] for file in _files(self.place) if (found := _SPLIT.match(plain_name(file)))})

    @cached_property
    def corpus(self) -> Mapping[str, dict]:
        whole = self._find("collection.tsv")
        if whole is None and len(tops := _tops(self.place)) > 1:
            raise ValueError(
                f"{self.place} (msmarco) has no collection.tsv and several top1000 files ({tops[0].name}, "
                f"{tops[1].name}, …); name one of them as the data"
            )
        return MsmarcoCorpus(whole) if whole else TopCorpus(tops[0])

    def queries(self, split: str | None = None) -> dict[str, str]:
        split = self.choose_split(split)
        if file := self._find(f"queries.{split}.tsv", f"queries.{split}"):
            return read_queries(file)
        if file := self._find(*(name.format(split) for name in _TOP)):
            return read_top(file)[0]
        raise self._no_file(f"queries.{split}.tsv")

    def qrels(self, split: str | None = None) -> Qrels:
        split = self.choose_split(split)
        if file := self._find(*(name.format(split) for name in _QRELS)):
            return read_table(file)
        raise self._no_file(f"qrels.{split}.tsv")

    def candidates(self, split: str | None = None) -> Run:
        split = self.choose_split(split)
        if file := self._find(*(name.format(split) for name in _TOP)):
            return read_top(file)[1]
        raise self._no_file(f"top1000.{split}")

    def examples(self, split: str | None = None) -> Iterator[Example]:
        split = self.choose_split(split)
        file = self._find(*(name.format(split) for name in _TRIPLES))
        if file is None:
            raise self._no_file(f"triples.{split}.tsv")
        if plain_name(file).startswith("qidpid"):
            return read_id_triples(file, self.queries(split), self.corpus)
        return read_triples(file)

    def _find(self, *names: str) -> Path | None:
        return Glance(Path(self.place)).holds(*names)

    def _no_file(self, name: str) -> ValueError:
        return ValueError(
            f"{self.place} (msmarco) has no {name}; its splits are {', '.join(self.splits) or 'none'}, "
            f"not each with every file"
        )


class TopFile(Collection):
    """One ``top1000`` file: queries, candidates and their texts."""

    format = "msmarco"
    looks_for = "a tsv with the columns qid, pid, query, passage (top1000) or pid, passage (collection.tsv)"
    parts = ("corpus", "queries", "candidates")

    @classmethod
    def recognises(cls, glance: Glance) -> bool:
        columns = glance.columns
        return len(columns) == 4 and not re.fullmatch(r"[+-]?[0-9]+(?:\.0*)?", columns[3].strip())  # else qrels

    @cached_property
    def corpus(self) -> Mapping[str, dict]:
        return TopCorpus(self.place)

    def queries(self, split: str | None = None) -> dict[str, str]:
        return read_top(self.place)[0]

    def candidates(self, split: str | None = None) -> Run:
        return read_top(self.place)[1]


class CollectionFile(Collection):
    """A ``collection.tsv`` without its folder: a corpus."""

    format = "msmarco"
    parts = ("corpus",)

    @classmethod
    def recognises(cls, glance: Glance) -> bool:
        return len(glance.columns) == 2

    @cached_property
    def corpus(self) -> Mapping[str, dict]:
        return MsmarcoCorpus(self.place)


def _files(folder: AnyPath) -> list[Path]:
    """Return the files of the folder, without the archives that MS MARCO is distributed in."""
    return sorted(file for file in Path(folder).iterdir() if file.is_file() and not plain_name(file).endswith(".tar"))


def _tops(folder: AnyPath) -> list[Path]:
    return [file for file in _files(folder) if file.name.startswith("top1000.")]


def read_queries(path: AnyPath) -> dict[str, str]:
    """Read ``queries.<split>.tsv``: query_id → text. Raises: ValueError naming file and line."""
    queries: dict[str, str] = {}
    for number, text in read_lines(path, "MS MARCO queries"):
        expect_no_mark(path, number, text)
        query_id, query = _columns(path, number, text, "qid", "query")
        if number == 1 and (query_id.lower(), query.lower()) in _HEADERS:
            continue
        if query_id in queries:
            raise line_error(path, number, f"the query id {query_id!r} occurs twice; ids must be unique")
        queries[query_id] = query
    if not queries:
        raise ValueError(f"{path}: no queries; expected lines qid <tab> query")
    return queries


def read_top(path: AnyPath) -> tuple[dict[str, str], Run]:
    """Read ``top1000``: (queries, run).

    The file has no scores, and the run keeps its order, which in the official files is no ranking.
    Raises: ValueError naming file and line.
    """
    queries: dict[str, str] = {}
    run: dict[str, dict[str, float]] = {}
    for number, query_id, doc_id, query, _ in _top_lines(path):
        if queries.setdefault(query_id, query) != query:
            raise line_error(path, number, f"query {query_id!r} had another text before: {shorten(queries[query_id])}")
        ranking = run.setdefault(query_id, {})
        if doc_id in ranking:
            raise line_error(path, number, f"passage {doc_id!r} occurs twice for query {query_id!r}; remove one line")
        ranking[doc_id] = -float(len(ranking) + 1)
    if not queries:
        raise ValueError(f"{path}: no candidates; expected {TopCorpus.expected}")
    return queries, {query_id: list(ranking.items()) for query_id, ranking in run.items()}


def read_triples(path: AnyPath) -> Iterator[Example]:
    """Read triples of texts as training examples; consecutive lines of one query and positive become one example."""

    def rows() -> Iterator[tuple[int, str, str, str]]:
        for number, text in read_lines(path, "MS MARCO triples"):
            query, positive, negative = _columns(path, number, text, "query", "positive", "negative")
            yield number, query, positive, negative

    return _grouped(path, rows(), lambda query: {"query": query}, lambda text: text)


def read_id_triples(path: AnyPath, queries: Mapping[str, str], passages: Mapping[str, dict]) -> Iterator[Example]:
    """Read triples of ids as training examples, look the texts up, and group them as `read_triples` does."""

    def rows() -> Iterator[tuple[int, str, str, str]]:
        for number, text in read_lines(path, "MS MARCO triples of ids"):
            expect_no_mark(path, number, text)
            query_id, positive, negative = _columns(path, number, text, "qid", "positive pid", "negative pid")
            if query_id not in queries:
                raise line_error(
                    path, number, f"query {query_id!r} is not in the queries; the files do not belong together"
                )
            for doc_id in (positive, negative):
                if doc_id not in passages:
                    raise line_error(
                        path, number, f"passage {doc_id!r} is not in the collection; the files do not belong together"
                    )
            yield number, query_id, positive, negative

    return _grouped(
        path,
        rows(),
        lambda query_id: {"query_id": query_id, "query": queries[query_id]},
        lambda doc_id: dict(passages[doc_id]),
    )


def _grouped(
    path: AnyPath,
    rows: Iterable[tuple[int, str, str, str]],
    start: Callable[[str], Example],
    document: Callable[[str], Any],
) -> Iterator[Example]:
    """Make one example of consecutive rows (line, query, positive, negative) of one query and positive."""
    key: tuple[str, str] | None = None
    example: Example = {}
    negatives: set[str] = set()
    for _, query, positive, negative in rows:
        if key != (query, positive):
            if example:
                yield example
            key, negatives = (query, positive), set()
            example = {**start(query), "positives": [document(positive)], "negatives": []}
        if negative not in negatives:
            negatives.add(negative)
            example["negatives"].append(document(negative))
    if not example:
        raise ValueError(f"{path}: no triples; expected lines query <tab> positive <tab> negative")
    yield example


def _top_lines(path: AnyPath) -> Iterator[tuple[int, str, str, str, str]]:
    for number, text in read_lines(path, "MS MARCO top1000"):
        expect_no_mark(path, number, text)
        query_id, doc_id, query, passage = _columns(
            path, number, text, "qid", "pid", "query", "passage", empty="passage"
        )
        yield number, query_id, doc_id, query, passage


def _columns(path: AnyPath, number: int, text: str, *names: str, empty: str = "") -> list[str]:
    """Return the columns of a line, of which only the one named ``empty`` may be empty."""
    columns = text.split("\t")
    if len(columns) != len(names):
        raise line_error(
            path, number, f"expected {len(names)} columns {' <tab> '.join(names)}, got {len(columns)}: {shorten(text)}"
        )
    for name, column in zip(names, columns, strict=True):
        if name != empty and not column.strip():
            raise line_error(path, number, f"the column {name} is empty")
    return columns
