"""BEIR folders: ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/<split>.tsv``, each plain or .gz."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from ..utils.files import AnyPath
from . import corpus
from .collection import Collection, Glance
from .io import line_error, parse_object, read_lines, require_id, require_text
from .qrels import read_table
from .trec import Qrels


class Corpus(corpus.FileCorpus):
    """Documents of ``corpus.jsonl``: a mapping from doc_id to {"id", "title", "text"}; see `corpus.FileCorpus`.

    Args:
        path: a BEIR folder, or the corpus file itself.
    """

    format = "beir"
    expected = 'lines {"_id", "title", "text"}'

    def __init__(self, path: AnyPath) -> None:
        super().__init__(find_file(path, "corpus.jsonl"))

    def parse(self, number: int, text: str) -> corpus.Document:
        """Return the checked document of a line.

        Args:
            number: Number of the line, from 1.
            text: The line, a JSON object.
        """
        return corpus.json_document(self.path, number, parse_object(self.path, number, text.rstrip()))


class Folder(Collection):
    """A BEIR folder; queries are the same for every split."""

    format = "beir"
    looks_for = "a folder with corpus.jsonl (BEIR)"

    @classmethod
    def recognises(cls, glance: Glance) -> bool:
        return glance.holds("corpus.jsonl", "queries.jsonl") is not None

    @property
    def parts(self) -> tuple[str, ...]:
        there = {
            "corpus": Glance(Path(self.place)).holds("corpus.jsonl"),
            "queries": Glance(Path(self.place)).holds("queries.jsonl"),
            "qrels": self.splits,
        }
        return tuple(part for part, found in there.items() if found)

    @property
    def splits(self) -> list[str]:
        return splits(self.place)

    @cached_property
    def corpus(self) -> Mapping[str, dict]:
        return Corpus(self.place)

    def queries(self, split: str | None = None) -> dict[str, str]:
        return read_queries(self.place)

    def qrels(self, split: str | None = None) -> Qrels:
        return read_qrels(self.place, split or self.choose_split(None))


def read_queries(path: AnyPath) -> dict[str, str]:
    """Read ``queries.jsonl``: query_id -> text, in the order of the file.

    Args:
        path: a BEIR folder, or the file itself.
    Raises: ValueError naming file and line; an empty query is an error.
    """
    path = find_file(path, "queries.jsonl")
    queries: dict[str, str] = {}
    for number, text in read_lines(path):
        record = parse_object(path, number, text)
        query_id = require_id(path, number, record)
        if query_id in queries:
            raise line_error(path, number, f"the query id {query_id!r} occurs twice; ids must be unique")
        queries[query_id] = require_text(path, number, record, "text")
    if not queries:
        raise ValueError(f'{path}: no queries; expected lines {{"_id", "text"}}')
    return queries


def read_qrels(path: AnyPath, split: str = "test") -> Qrels:
    """Read ``qrels/<split>.tsv``: query_id -> doc_id -> relevance.

    Args:
        path: a BEIR folder, or the file itself (``split`` is then not used).
    Raises: ValueError naming file and line; FileNotFoundError that lists the splits there are.
    """
    path = Path(path)
    if not path.is_file():
        try:
            path = find_file(path, f"qrels/{split}.tsv")
        except FileNotFoundError as error:
            there = splits(path)
            raise FileNotFoundError(f"{error}; splits there: {', '.join(there)}" if there else str(error)) from None
    return read_table(path)


def splits(folder: AnyPath) -> list[str]:
    """Return the names of the splits that a BEIR folder has qrels for."""
    qrels = Path(folder, "qrels")
    names = os.listdir(qrels) if qrels.is_dir() else []  # not glob, which takes a folder that cannot be read for empty
    return sorted(
        {name.removesuffix(".gz").removesuffix(".tsv") for name in names if name.endswith((".tsv", ".tsv.gz"))}
    )


def find_file(path: AnyPath, name: str) -> Path:
    """Return ``path`` itself if it is no folder, else ``name`` or ``name.gz`` in the folder ``path``."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder; expected a BEIR folder with {name}")
    for candidate in (path / name, path / f"{name}.gz"):
        if candidate.exists():
            return candidate
    raise FileNotFoundError(f"{path} is no BEIR folder with {name}: neither {name} nor {name}.gz is there")
