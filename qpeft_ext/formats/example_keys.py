"""Training examples under the keys of other libraries, read as this package's own.

    own                     query_id?, query, positives, negatives?, positive_scores?, negative_scores?
    sentence-transformers   query, anchor or question; positive or answer; negative, negative_1, negative_2, …
                            or a list of docs or documents with a list of labels, 1 for each relevant one
    FlagEmbedding           query, pos, neg, pos_scores?, neg_scores?, pos_id?, neg_id?
    Tevatron                query_id, query, positive_passages, negative_passages: [{docid, title, text}]

Values may be those of numpy, pandas, Arrow or torch.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any

from ..utils.text import shorten
from ..utils.words import counted

logger = logging.getLogger(__name__)

_OWN = ("query", "positives", "negatives", "positive_scores", "negative_scores")
_QUERIES = ("query", "anchor", "question")
_QUERY_IDS = ("query_id", "qid")
_SIDES = {"positives": ("positive_passages", "positive", "pos"), "negatives": ("negative_passages", "negative", "neg")}
_ANSWER = "answer"  # the positive, where there is none by another name
_ALIASES = {"positives": "pos", "negatives": "neg"}  # FlagEmbedding's, whose scores and ids begin like that
_NUMBERED = re.compile(r"negative_[0-9]+")
_LISTS, _LABELS = ("docs", "documents"), ("labels", "label", "scores", "score")
_IDS, _TEXTS = ("docid", "doc_id", "_id"), ("contents",)
_UNUSED = {
    "prompt": "the prompt is the same for all examples: instruction and template of QPeftConfig",
    **dict.fromkeys(_LABELS, "a teacher's scores are positive_scores and negative_scores, a number for each document"),
}
_EXPECTED = (
    "a query and its documents: query, positives, negatives; or the keys of sentence-transformers (anchor, "
    "positive, negative), FlagEmbedding (query, pos, neg) or Tevatron (query, positive_passages)"
)


def are_of_examples(keys: Iterable[str]) -> bool:
    """Return True if a record with these keys is a training example."""
    keys = set(keys)
    documents = {"positives", *_SIDES["positives"], _ANSWER} & keys or (keys & {*_LISTS} and keys & {*_LABELS})
    return bool(keys & {*_QUERIES} and documents)


def query_key(keys: Iterable[str]) -> str:
    """Return the key of the query; "query" if there is none."""
    keys = set(keys)
    return next((name for name in _QUERIES if name in keys), "query")


def query_id_key(keys: Iterable[str]) -> str | None:
    """Return the key of the query's id; None if there is none."""
    keys = set(keys)
    return next((name for name in _QUERY_IDS if name in keys), None)


class ExampleKeys:
    """Reader of the examples of one file or data set, which warns once about each key that it does not use.

    Args:
        place: where the examples are from, for the warning.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self._said: set[str] = set()

    def own(self, example: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the example under this package's keys; the same object if it has them already.

        Further keys are kept. Values are not checked here.
        Raises: ValueError, without a place, for keys that could mean several things.
        """
        keys = example.keys()
        if {"query", "positives", "negatives"} <= keys and all(map(_is_own, example.values())):
            return example
        rest = {
            key: value for key, value in zip(keys, map(plain, example.values()), strict=True) if not _is_missing(value)
        }
        if "positive_ctxs" in rest:
            raise ValueError(
                "these are the keys of DPR's training files: give the whole JSON file as --data, or "
                "qpeft convert FILE OUT.jsonl --to jsonl"
            )
        if not are_of_examples(rest):
            raise ValueError(_why_none(rest))
        if "positives" in rest:  # our own keys, where only negatives or a plain value is missing
            own = {"query": rest.pop(query_key(rest)), "positives": rest.pop("positives")}
        else:
            own = {"query": rest.pop(query_key(rest)), **_documents_of(rest)}
        if "negatives" not in own:
            own["negatives"] = rest.pop("negatives") if "negatives" in rest else _side(rest, "negatives", own)
        for key in ("positives", "negatives"):
            if isinstance(own[key], (list, tuple)):
                own[key] = list(map(_document, own[key]))
        own = {key: own[key] for key in _OWN if key in own}
        if (name := query_id_key(rest)) is not None:
            own = {"query_id": rest.pop(name), **own}
        for key in _UNUSED.keys() & rest.keys():
            self._say(key)
        return own | rest

    def _say(self, key: str) -> None:
        if key not in self._said:
            self._said.add(key)
            logger.warning("%s: the key %r is not used: %s", self.place, key, _UNUSED[key])


def table_rows(table: Any) -> Any:
    """Return a table of pandas, polars or Arrow as a list of rows, and anything else unchanged."""
    if hasattr(table, "to_dict") and hasattr(table, "columns"):
        return table.to_dict("records") if hasattr(table, "iloc") else table.to_dicts()
    return table.to_pylist() if hasattr(table, "to_pylist") and hasattr(table, "column_names") else table


def plain(value: Any) -> Any:
    """Return an array, series or scalar of numpy, pandas, Arrow or torch as a value of Python."""
    if isinstance(value, (str, int, float, list, tuple, Mapping)) and type(value).__module__ != "numpy":
        return value
    for name in ("as_py", "to_pylist", "tolist", "to_list"):
        if hasattr(value, name):
            value = getattr(value, name)()
            break
    return value


def _is_missing(value: Any) -> bool:
    """Return True for the values of a table where a row lacks the key: None, NaN or the NA of pandas."""
    return value is None or isinstance(value, float) and value != value or type(value).__name__ == "NAType"


def _is_own(value: Any) -> bool:
    if type(value) in (list, tuple):
        return not any(map(_is_renamed, value))
    return type(value) in (str, int, bool, dict, float) and not _is_missing(value)


def _is_renamed(document: Any) -> bool:
    """Return True if `_document` would change it."""
    return isinstance(document, Mapping) and (
        "id" not in document
        and any(key in document for key in _IDS)
        or "text" not in document
        and any(key in document for key in _TEXTS)
    )


def _document(document: Any) -> Any:
    document = plain(document)
    if not isinstance(document, Mapping) or not _is_renamed(document):
        return document
    document = dict(document)
    for own, names in (("id", _IDS), ("text", _TEXTS)):
        name = next((name for name in names if own not in document and name in document), None)
        if name:
            document[own] = plain(document.pop(name))
    return document


def _documents_of(rest: dict[str, Any]) -> dict[str, Any]:
    """Take positives and negatives out of ``rest``."""
    if not any(name in rest for name in (*_SIDES["positives"], *_LISTS)):
        rest["positive"] = rest.pop(_ANSWER)
    if any(name in rest for name in _SIDES["positives"]):
        own: dict[str, Any] = {}
        own["positives"] = _side(rest, "positives", own)
        own["negatives"] = _side(rest, "negatives", own)
        return own
    name = next(name for name in _LISTS if name in rest)
    label = next(name for name in _LABELS if name in rest)
    documents, labels = rest.pop(name), rest.pop(label)
    if (
        not isinstance(documents, Sequence)
        or isinstance(documents, str)
        or not isinstance(labels, Sequence)
        or len(labels) != len(documents)
    ):
        raise ValueError(
            f"expected a list under {name!r} and as many labels under {label!r}, got "
            f"{shorten(documents)} and {shorten(labels)}"
        )
    if not all(value in (0, 1) for value in labels):
        raise ValueError(
            f"expected 1 (relevant) or 0 under {label!r}, got {shorten(labels)}; a teacher's scores "
            f"belong to positive_scores and negative_scores"
        )
    return {
        "positives": [document for document, value in zip(documents, labels, strict=True) if value],
        "negatives": [document for document, value in zip(documents, labels, strict=True) if not value],
    }


def _side(rest: dict[str, Any], side: str, own: dict[str, Any]) -> list[Any]:
    """Take the documents of one side, and their ids, out of ``rest``; their scores go to ``own``."""
    there = [name for name in _SIDES[side] if name in rest]
    numbered = (
        sorted((name for name in rest if _NUMBERED.fullmatch(name)), key=lambda name: int(name[9:]))
        if side == "negatives"
        else []
    )
    if len(there) > 1 or there and numbered and there != ["negative"]:
        raise ValueError(f"the keys {' and '.join((there + numbered)[:2])} both name {side}; leave one of them out")
    if numbered:
        values = [rest.pop(name) for name in (*there, *numbered)]
        return [document for value in values for document in _listed(value)]
    documents = _listed(rest.pop(there[0])) if there else []
    alias = _ALIASES[side]
    if (scores := rest.pop(f"{alias}_scores", None)) is not None:
        own[f"{side[:-1]}_scores"] = scores
    if (ids := rest.pop(f"{alias}_id", None)) is not None:
        if not isinstance(ids, Sequence) or isinstance(ids, str) or len(ids) != len(documents):
            raise ValueError(
                f"expected an id under {alias + '_id'!r} for each of {counted(len(documents), 'documents')}, got "
                f"{shorten(ids)}"
            )
        documents = [
            {"id": doc_id, "text": document} if isinstance(document, str) else document
            for doc_id, document in zip(ids, documents, strict=True)
        ]
    return documents


def _listed(value: Any) -> list[Any]:
    """Return a list as it is, and one document as a list of one."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _why_none(keys: Iterable[str]) -> str:
    keys = list(keys)
    got = ", ".join(map(str, keys[:12])) or "none"
    if set(keys) & {*_LABELS} and len(keys) in (3, 4):
        return (
            f"a row of one document and its label is no training example: group the rows of a query as query, "
            f"docs, labels; got the keys {got}"
        )
    return f"expected {_EXPECTED}; got the keys {got}"


def view(examples: Any, place: str) -> Any:
    """Return the examples under our own keys: a list for a list, a view for a `datasets.Dataset` or an iterable.

    Errors begin with ``place`` and the number of the example, from 0.
    """
    examples, keys = table_rows(examples), ExampleKeys(place)
    if isinstance(examples, (list, tuple)):
        own = [_own(keys, example, index) for index, example in enumerate(examples)]
        return examples if all(a is b for a, b in zip(own, examples, strict=True)) else own
    sized = hasattr(examples, "__len__") and hasattr(examples, "__getitem__")
    return _SizedView(examples, keys) if sized else _StreamView(examples, keys)


def _own(keys: ExampleKeys, example: Any, index: int) -> Any:
    if not isinstance(example, Mapping):
        example = example.to_dict() if hasattr(example, "to_dict") else example  # a row of pandas
    if not isinstance(example, Mapping):
        return example  # which the check of examples refuses
    try:
        return keys.own(example)
    except ValueError as error:
        raise ValueError(f"{keys.place} {index}: {error}") from None


class _SizedView(Sequence):
    """A view of examples that have a length and are read by their number."""

    def __init__(self, examples: Any, keys: ExampleKeys) -> None:
        self.examples, self.keys = examples, keys

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        return _own(self.keys, self.examples[index], index)

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))  # a data set need not raise IndexError behind its end

    def queries(self) -> Iterator[tuple[Any, str]]:
        """Return (query id or None, query) of every example of a `datasets.Dataset`; nothing of other data sets."""
        names = getattr(self.examples, "column_names", ())
        if (name := query_key(names)) not in names:
            return iter(())
        id_name = query_id_key(names)
        ids = self.examples[id_name] if id_name else repeat(None, len(self))
        return zip(map(plain, ids), self.examples[name], strict=True)


class _StreamView:
    """A view of examples that are read one after the other."""

    def __init__(self, examples: Iterable, keys: ExampleKeys) -> None:
        self.examples, self.keys = examples, keys

    def __iter__(self) -> Iterator[Any]:
        return (_own(self.keys, example, index) for index, example in enumerate(self.examples))

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.examples, "set_epoch"):
            self.examples.set_epoch(epoch)
