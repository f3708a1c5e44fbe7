"""Data sets of the library ``datasets``: ``hf:owner/name`` on the Hub, or a folder that its ``save_to_disk`` wrote.

Retrieval sets in the shape of MTEB and BEIR have three configurations (on disk: three folders): ``corpus`` (_id,
title, text), ``queries`` (_id, text) and ``default`` or ``qrels`` (query-id, corpus-id, score). Anything else is read
as training examples: rows with a query and positives, under any keys that `example_keys` knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ..utils.files import AnyPath
from ..utils.text import shorten
from .collection import Collection, Example, Glance
from .example_keys import ExampleKeys
from .qrels import whole_relevance
from .trec import Qrels

PREFIX = "hf:"
_MARKS = ("dataset_dict.json", "state.json")  # files that save_to_disk writes
_EXTRA = "data sets of the Hub need the package datasets: pip install 'qpeft_ext[datasets]'"
_QRELS = ("qrels", "default")


class Documents(Mapping[str, dict]):
    """Rows {"_id", "title"?, "text"} by id. Texts stay in the memory-mapped file of ``datasets``, ids in memory."""

    def __init__(self, place: str, rows: Any) -> None:
        self._rows, self._place = rows, place
        self._ids = [_id(place, "corpus", number, "_id", value) for number, value in enumerate(rows["_id"], start=1)]
        self._places = {doc_id: i for i, doc_id in enumerate(self._ids)}
        if len(self._places) < len(self._ids):
            first = {doc_id: i for i, doc_id in reversed(list(enumerate(self._ids)))}
            i, twice = next((i, doc_id) for i, doc_id in enumerate(self._ids) if first[doc_id] < i)
            raise ValueError(
                f"{place}, row {i + 1} of corpus: the document id {twice!r} occurs twice; ids must be unique"
            )

    def __getitem__(self, doc_id: str) -> dict[str, str]:
        place = self._places[doc_id]
        row = self._rows[place]
        title = row.get("title")
        for key, value in (("title", "" if title is None else title), ("text", row["text"])):
            if not isinstance(value, str):
                raise ValueError(f"{self._place}, row {place + 1} of corpus: {_expected(key, value)}")
        return {"id": doc_id, "title": title or "", "text": row["text"]}

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def version(self) -> str:
        return self.fingerprint()

    def fingerprint(self) -> str:
        return f"datasets-{self._rows._fingerprint}"


class Dataset(Collection):
    """A data set in any of the shapes above."""

    format = "datasets"
    looks_for = f"{PREFIX}owner/name (a data set of the Hub), or a folder with {_MARKS[0]} (datasets)"

    def __init__(self, place: AnyPath) -> None:
        super().__init__(place)
        self._loaded: dict[str | None, dict[str, Any]] = {}

    @classmethod
    def recognises(cls, glance: Glance) -> bool:
        names = ("corpus/state.json", "corpus/dataset_dict.json", *_MARKS)
        return glance.is_folder and any((glance.path / name).is_file() for name in names)

    @property
    def parts(self) -> tuple[str, ...]:
        if not self._is_retrieval:
            return ("examples",)
        return tuple(part for part in ("corpus", "queries", "qrels") if self._name(part) in self._configurations)

    @property
    def splits(self) -> list[str]:
        return sorted(self._load(self._name("qrels") if self._is_retrieval else None))

    @cached_property
    def corpus(self) -> Mapping[str, dict]:
        self._check("corpus")
        rows = self._only("corpus")
        self._columns(rows, "corpus", "_id", "text")
        return Documents(self.place, rows)

    def queries(self, split: str | None = None) -> dict[str, str]:
        self._check("queries")
        rows = self._only("queries")
        self._columns(rows, "queries", "_id", "text")
        queries: dict[str, str] = {}
        for number, (value, text) in enumerate(zip(rows["_id"], rows["text"], strict=True), start=1):
            query_id = _id(self.place, "queries", number, "_id", value)
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{self.place}, row {number} of queries: {_expected('text', text)}")
            if queries.setdefault(query_id, text) != text:
                raise ValueError(
                    f"{self.place}, row {number} of queries: the query id {query_id!r} has had another text; "
                    "ids must be unique"
                )
        return queries

    def qrels(self, split: str | None = None) -> Qrels:
        self._check("qrels")
        rows = self._load(self._name("qrels"))[self.choose_split(split)]
        self._columns(rows, "qrels", "query-id", "corpus-id", "score")
        qrels: Qrels = {}
        columns = zip(rows["query-id"], rows["corpus-id"], rows["score"], strict=True)
        for number, (query_id, doc_id, score) in enumerate(columns, start=1):
            query_id, doc_id = (
                _id(self.place, "qrels", number, key, value)
                for key, value in (("query-id", query_id), ("corpus-id", doc_id))
            )
            where = f"{self.place}, row {number} of qrels"
            relevance = whole_relevance(where, score)
            if qrels.setdefault(query_id, {}).setdefault(doc_id, relevance) != relevance:
                raise ValueError(
                    f"{where}: document {shorten(doc_id)} has had another relevance for query {shorten(query_id)}"
                )
        return qrels

    def examples(self, split: str | None = None) -> Iterator[Example]:
        if self._is_retrieval:
            raise self.lacks("examples")
        rows = self._load(None)[
            split := self.choose_split("train" if split is None and "train" in self.splits else split)
        ]
        return self._examples(rows, split)

    def _examples(self, rows, split: str) -> Iterator[Example]:
        keys = ExampleKeys(f"{self.place}, {split}")
        for number, row in enumerate(rows, start=1):
            where = f"{self.place}, row {number} of {split}"
            try:
                row = keys.own(row)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            if not isinstance(row["query"], str) or not row["query"].strip():
                raise ValueError(f"{where}: expected a text as the query, got {row['query']!r}")
            example = {
                "query": row["query"],
                "positives": _documents(where, "positives", row["positives"]),
                "negatives": _documents(where, "negatives", row["negatives"]),
            }
            if not example["positives"]:
                raise ValueError(f"{where}: the positives are empty; expected at least one document")
            example |= {key: row[key] for key in ("positive_scores", "negative_scores") if key in row}
            if row.get("query_id") is not None:
                example = {"query_id": str(row["query_id"]), **example}
            yield example

    @cached_property
    def _configurations(self) -> list[str]:
        if Path(self.place).is_dir():
            return sorted(
                folder.name
                for folder in Path(self.place).iterdir()
                if any((folder / mark).is_file() for mark in _MARKS)
            )
        return list(_library().get_dataset_config_names(self.place.removeprefix(PREFIX)))

    @property
    def _is_retrieval(self) -> bool:
        return "corpus" in self._configurations

    def _name(self, part: str) -> str:
        return part if part != "qrels" else next((n for n in _QRELS if n in self._configurations), "qrels")

    def _load(self, configuration: str | None) -> dict[str, Any]:
        """Return split → rows. A set that was saved without splits is "train", as `load_dataset` would call it."""
        if configuration not in self._loaded:
            library, folder = _library(), Path(self.place)
            if folder.is_dir():
                rows = library.load_from_disk(str(folder / configuration if configuration else folder))
            else:
                rows = library.load_dataset(self.place.removeprefix(PREFIX), configuration)
            self._loaded[configuration] = rows if isinstance(rows, dict) else {"train": rows}
        return self._loaded[configuration]

    def _only(self, configuration: str) -> Any:
        """Return the rows of a configuration that has one split, whatever that is called."""
        splits = self._load(configuration)
        if len(splits) > 1:
            raise ValueError(f"{self.place}: expected one split in {configuration}, got {', '.join(splits)}")
        return next(iter(splits.values()))

    def _columns(self, rows: Any, configuration: str, *names: str) -> None:
        if missing := [name for name in names if name not in rows.column_names]:
            raise ValueError(
                f"{self.place}, {configuration}: expected the columns {', '.join(names)}, got "
                f"{', '.join(rows.column_names)}; {', '.join(missing)} is missing"
            )

    def _check(self, part: str) -> None:
        if part not in self.parts:
            raise self.lacks(part)


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise ImportError(_EXTRA) from None
    return datasets


def _id(place: str, part: str, number: int, key: str, value: object) -> str:
    """Return an id as text. Raises: ValueError that names the row if there is none."""
    if value is None or not str(value).strip():
        raise ValueError(f"{place}, row {number} of {part}: expected an id under {key!r}, got {value!r}")
    return str(value)


def _expected(key: str, got: object) -> str:
    return f"expected a text under {key!r}, got {shorten(got)}"


def _documents(where: str, key: str, value: object) -> list[Any]:
    """Return texts, and objects with "text" whose ids become texts."""
    documents = []
    for document in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(document, dict) and isinstance(document.get("text"), str):
            identity = {} if document.get("id") is None else {"id": str(document["id"])}
            document = {**identity, "title": document.get("title") or "", "text": document["text"]}
        elif not isinstance(document, str):
            raise ValueError(f"{where}: expected texts or objects with 'text' under {key!r}, got {document!r}")
        documents.append(document)
    return documents
