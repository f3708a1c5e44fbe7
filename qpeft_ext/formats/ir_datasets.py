"""Data sets of the library ``ir_datasets`` by their ids, such as ``msmarco-passage/trec-dl-2019/judged``.

The library downloads data sets to its own folder and looks documents up there. An id is one split.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from .collection import Collection
from .trec import Qrels, Run

_EXTRA = "pip install 'qpeft_ext[ir_datasets]'"


class Documents(Mapping[str, dict]):
    """The documents of an ``ir_datasets`` data set by id, read from its own store."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    @cached_property
    def _store(self) -> Any:
        return self.dataset.docs_store()

    @cached_property
    def _length(self) -> int:
        count = self.dataset.docs_count()  # None where the library does not know it
        return sum(1 for _ in self) if count is None else count

    def __getitem__(self, doc_id: str) -> dict[str, str]:
        document = self._store.get(doc_id)
        title = getattr(document, "title", None) or ""
        text = getattr(document, "text", None) if title or hasattr(document, "text") else None
        if text is None:  # other fields: the library makes one text of them, with the title in it
            title, text = "", document.default_text()
        return {"id": document.doc_id, "title": title, "text": text}

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[str]:
        return (document.doc_id for document in self.dataset.docs_iter())

    def version(self) -> str:
        return self.fingerprint()

    def fingerprint(self) -> str:
        # no hyphen within the id: the text behind the second hyphen is the version, and a new version replaces the old
        return f"ir_datasets-{self.dataset.dataset_id().replace('/', '.').replace('-', '_')}"


class Dataset(Collection):
    """One id of ``ir_datasets``."""

    format = "ir_datasets"
    looks_for = "an id of ir_datasets, such as beir/scifact/test"

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self._dataset = load(place)

    @property
    def parts(self) -> tuple[str, ...]:
        data = self._dataset
        there = {
            "corpus": data.has_docs(),
            "queries": data.has_queries(),
            "answers": self._has_answers,
            "qrels": data.has_qrels(),
            "candidates": data.has_scoreddocs(),
        }
        return tuple(part for part, found in there.items() if found)

    @cached_property
    def corpus(self) -> Mapping[str, dict]:
        self._check("corpus")
        return Documents(self._dataset)

    def queries(self, split: str | None = None) -> dict[str, str]:
        self._check("queries", split)
        return {query.query_id: _query_text(query) for query in self._dataset.queries_iter()}

    def answers(self, split: str | None = None) -> dict[str, list[str]]:
        self._check("answers", split)
        return {query.query_id: list(query.answers) for query in self._dataset.queries_iter()}

    def qrels(self, split: str | None = None) -> Qrels:
        self._check("qrels", split)
        qrels: Qrels = {}
        for judgement in self._dataset.qrels_iter():
            judged = qrels.setdefault(judgement.query_id, {})
            # some official files judge a document once per sub-topic: relevant to one is relevant
            judged[judgement.doc_id] = max(judgement.relevance, judged.get(judgement.doc_id, judgement.relevance))
        return qrels

    def candidates(self, split: str | None = None) -> Run:
        self._check("candidates", split)
        run: dict[str, dict[str, float]] = {}
        for candidate in self._dataset.scoreddocs_iter():
            run.setdefault(candidate.query_id, {})[candidate.doc_id] = float(candidate.score)
        return {query_id: sorted(ranking.items(), key=lambda item: -item[1]) for query_id, ranking in run.items()}

    @property
    def _has_answers(self) -> bool:
        return self._dataset.has_queries() and "answers" in getattr(self._dataset.queries_cls(), "_fields", ())

    def _check(self, part: str, split: str | None = None) -> None:
        if split is not None:
            self.choose_split(split)
        if part not in self.parts:
            raise self.lacks(part)


def load(name: str) -> Any:
    """Return the data set of an id. Raises: ImportError without the library, ValueError for an unknown id."""
    try:
        import ir_datasets
    except ImportError:
        raise ImportError(f"{name}: ids of ir_datasets need that package: {_EXTRA}") from None
    try:
        return ir_datasets.load(name)
    except KeyError:
        raise ValueError(f"ir_datasets has no data set {name!r}; https://ir-datasets.com lists them") from None


def _query_text(query: Any) -> str:
    return query.text if hasattr(query, "text") else query.default_text()
