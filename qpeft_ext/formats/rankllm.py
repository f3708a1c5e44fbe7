"""Pre-retrieved candidates with their texts, as RankLLM reads and writes them; JSON lines or a list, plain or .gz.

    {"query": {"text", "qid"}, "candidates": [{"docid", "score", "doc": {"title"?, "text"}}]}

Its older shape is read too: {"query": "text", "hits": [{"qid", "docid", "score", "content"}]}.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..utils.files import AnyPath
from ..utils.text import shorten
from . import corpus
from .collection import Collection, Glance
from .io import line_error, require_id, require_text
from .json_records import RecordPlace, read_records
from .trec import Run
from .upr import read_score

_TEXTS = ("text", "segment", "contents", "content", "body", "passage")  # the keys that RankLLM looks under


@dataclass
class Request:
    """One query and its candidates."""

    place: RecordPlace
    query_id: str
    query: str
    ranking: list[tuple[str, float]]
    documents: list[dict[str, str]]


class Contexts(corpus.FileCorpus):
    """The documents inside the file."""

    format = "rankllm"
    expected = 'records {"query", "candidates"}'
    by_lines = False

    def documents(self) -> Iterator[tuple[int, corpus.Document]]:
        for request in read_requests(self.path):
            for document in request.documents:
                yield request.place, document


class RequestsFile(Collection):
    """One file: queries, candidates and their texts."""

    format = "rankllm"
    looks_for = 'json or jsonl with "query" and "candidates" or "hits" (RankLLM)'
    parts = ("corpus", "queries", "candidates")

    @classmethod
    def recognises(cls, glance: Glance) -> bool:
        return glance.has("candidates", "hits") and glance.has("query")

    @cached_property
    def corpus(self) -> Mapping[str, dict]:
        return Contexts(self.place)

    def queries(self, split: str | None = None) -> dict[str, str]:
        return self._content[0]

    def candidates(self, split: str | None = None) -> Run:
        return self._content[1]

    @cached_property
    def _content(self) -> tuple[dict[str, str], Run]:
        queries, run = {}, {}
        for request in read_requests(self.place):
            queries[request.query_id] = request.query
            run[request.query_id] = sorted(request.ranking, key=lambda candidate: -candidate[1])  # stable
        return queries, run


def read_requests(path: AnyPath) -> Iterator[Request]:
    """Yield the queries of the file with their candidates. Raises: ValueError naming file, line and record."""
    seen: set[str] = set()
    for place, _, record in read_records(path, "query", "candidates with text (RankLLM)"):
        key = "candidates" if "candidates" in record else "hits"
        rows = record.get(key)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise line_error(
                path,
                place,
                f"expected a list of candidates under 'candidates', got "
                f"{shorten(rows) if key in record else 'no such key'}",
            )
        query_id, query = _query(path, place, record, rows)
        if query_id in seen:
            raise line_error(path, place, f"the query id {query_id!r} occurs twice; ids must be unique")
        seen.add(query_id)
        request = Request(place, query_id, query, [], [])
        known: set[str] = set()
        for row in rows:
            doc_id = require_id(path, place, row, "docid")
            if doc_id in known:
                raise line_error(path, place, f"document {doc_id!r} occurs twice; remove one")
            known.add(doc_id)
            request.ranking.append((doc_id, read_score(path, place, row)))
            request.documents.append(_document(path, place, doc_id, row))
        yield request
    if not seen:
        raise ValueError(f'{path}: no queries; expected records {{"query": {{"text", "qid"}}, "candidates"}}')


def _query(path: AnyPath, place: RecordPlace, record: dict[str, Any], rows: list[dict]) -> tuple[str, str]:
    """Return (query_id, text); the id belongs to the query or, in the older shape, to each hit."""
    query = record.get("query")
    if isinstance(query, dict):
        return require_id(path, place, query, "qid"), require_text(path, place, query, "text")
    owner = record if "qid" in record else rows[0] if rows else record
    return require_id(path, place, owner, "qid"), require_text(path, place, record, "query")


def _document(path: AnyPath, place: RecordPlace, doc_id: str, row: dict[str, Any]) -> dict[str, str]:
    content = row.get("doc", row)
    if isinstance(content, str):
        content = {"text": content}
    if not isinstance(content, dict):
        raise line_error(path, place, f"expected an object or a text under 'doc', got {shorten(content)}")
    key = next((key for key in _TEXTS if key in content), "text")
    title = "" if content.get("title") is None else require_text(path, place, content, "title", empty=True)
    return {"id": doc_id, "title": title, "text": require_text(path, place, content, key, empty=True)}
