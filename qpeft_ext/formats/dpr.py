"""DPR: ``psgs_w100.tsv`` (text *before* title), question sets (``*.qa.csv``) and training json.

    passages   id <tab> text <tab> title, with that header; texts may be quoted as in csv
    questions  question <tab> ['answer', …]
    training   [{"question", "answers", "positive_ctxs": [{"title", "text", "passage_id"}], "hard_negative_ctxs",
               "negative_ctxs"}, …]

Questions have no ids there: their place in the file, from 0, is their query_id.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..utils.files import AnyPath
from ..utils.text import shorten
from . import corpus
from .answers import answer_qrels
from .collection import Collection, Glance
from .io import check_unicode, expect_no_mark, line_error, read_lines, require_text
from .json_records import RecordPlace, read_records
from .jsonl import Example
from .trec import Qrels, Run

HEADER = ["id", "text", "title"]
PASSAGES = "psgs_w100.tsv"
_POSITIVES, _NEGATIVES = "positive_ctxs", ("hard_negative_ctxs", "negative_ctxs")


class Passages(corpus.FileCorpus):
    """``psgs_w100.tsv``."""

    format = "dpr"
    expected = f"a header line {' <tab> '.join(HEADER)} and lines below it"

    def parse(self, number: int, text: str) -> corpus.Document | None:
        expect_no_mark(self.path, number, text)
        columns = [unquote(column) for column in text.rstrip("\r\n").split("\t")]
        if len(columns) != 3 or not columns[0].strip():
            raise line_error(self.path, number, f"expected 3 columns {' <tab> '.join(HEADER)}, got {shorten(text)}")
        if columns == HEADER:
            return None
        return {"id": columns[0], "title": columns[2], "text": columns[1]}


class PassagesFile(Collection):
    """A ``psgs_w100.tsv`` without its folder: a corpus."""

    format = "dpr"
    looks_for = "a tsv with the header id, text, title (DPR's psgs_w100.tsv)"
    parts = ("corpus",)

    @classmethod
    def recognises(cls, glance: Glance) -> bool:
        return glance.columns == HEADER

    @cached_property
    def corpus(self) -> Mapping[str, dict]:
        return Passages(self.place)


class Questions(Collection):
    """A question set with short answers; passages from ``psgs_w100.tsv`` in its folder or one above."""

    format = "dpr questions"
    looks_for = "a tsv with the columns question, ['answer', …] (DPR's *.qa.csv)"

    @classmethod
    def recognises(cls, glance: Glance) -> bool:
        return len(glance.columns) == 2 and unquote(glance.columns[1]).startswith("[")

    @property
    def parts(self) -> tuple[str, ...]:
        return ("corpus",) * (find_passages(self.place) is not None) + ("queries", "answers")

    @cached_property
    def corpus(self) -> Mapping[str, dict]:
        return passages_near(self.place)

    def queries(self, split: str | None = None) -> dict[str, str]:
        return {query_id: question for query_id, (question, _) in read_questions(self.place).items()}

    def answers(self, split: str | None = None) -> dict[str, list[str]]:
        return {query_id: answers for query_id, (_, answers) in read_questions(self.place).items()}

    def judge(self, split: str | None, runs: Sequence[Run]) -> Qrels:
        return answer_qrels(runs, self.answers(), self.corpus)


class Contexts(corpus.FileCorpus):
    """The passages inside a training file, by their ids."""

    format = "dpr_training"
    expected = f'a list of {{"question", "{_POSITIVES}"}}, with a passage_id in each passage'
    by_lines = False

    def documents(self) -> Iterator[tuple[int, corpus.Document]]:
        for place, _, record in read_records(self.path, "question", "DPR training json"):
            for key in (_POSITIVES, *_NEGATIVES):
                for document in _documents(self.path, place, record, key):
                    if "id" not in document:
                        raise line_error(
                            self.path, place, f"a passage in {key!r} has no passage_id, so it cannot be looked up"
                        )
                    yield place, {"id": document["id"], "title": document["title"], "text": document["text"]}


class TrainingFile(Collection):
    """Training json: examples; and, where the passages have ids, qrels of the positives and a corpus."""

    format = "dpr training"
    looks_for = 'json with "question" and "positive_ctxs" (DPR training)'

    @classmethod
    def recognises(cls, glance: Glance) -> bool:
        return glance.has(_POSITIVES)

    @cached_property
    def parts(self) -> tuple[str, ...]:
        _, _, first = next(self._records())
        if not first.get(_POSITIVES):  # its passages show nothing
            first = next((record for _, _, record in self._records() if record.get(_POSITIVES)), first)
        passages = first.get(_POSITIVES)
        has_ids = isinstance(passages, list) and all(isinstance(p, dict) and _id(p) is not None for p in passages)
        has_ids = has_ids and passages != []
        there = {"corpus": has_ids, "queries": True, "answers": "answers" in first, "qrels": has_ids, "examples": True}
        return tuple(part for part, found in there.items() if found)

    @cached_property
    def corpus(self) -> Mapping[str, dict]:
        return Contexts(self.place)

    def queries(self, split: str | None = None) -> dict[str, str]:
        return {str(i): require_text(self.place, place, record, "question") for i, place, record in self._records()}

    def answers(self, split: str | None = None) -> dict[str, list[str]]:
        return {str(i): read_answers(self.place, place, record) for i, place, record in self._records()}

    def qrels(self, split: str | None = None) -> Qrels:
        qrels: Qrels = {}
        for i, place, record in self._records():
            documents = _documents(self.place, place, record, _POSITIVES)
            if any("id" not in document for document in documents):
                raise line_error(self.place, place, "a positive passage has no passage_id, so it cannot be judged")
            if documents:
                qrels[str(i)] = {document["id"]: 1 for document in documents}
        return qrels

    def examples(self, split: str | None = None) -> Iterator[Example]:
        """Hard negatives come first. Questions without a positive are counted in ``left_out``, as DPR leaves them."""
        self.left_out = {"questions without a positive passage": 0}
        for i, place, record in self._records():
            positives = _documents(self.place, place, record, _POSITIVES)
            example = {
                "query_id": str(i),
                "query": require_text(self.place, place, record, "question"),
                "positives": positives,
                "negatives": [d for key in _NEGATIVES for d in _documents(self.place, place, record, key)],
            }
            if "answers" in record:
                example["answers"] = read_answers(self.place, place, record)
            if positives:
                yield example
            else:
                self.left_out["questions without a positive passage"] += 1

    def _records(self) -> Iterator[tuple[int, RecordPlace, dict]]:
        count = 0
        for count, (place, _, record) in enumerate(read_records(self.place, "question", "DPR training json"), 1):
            yield count - 1, place, record
        if not count:
            raise ValueError(f"{self.place}: no questions; expected {Contexts.expected}")


def read_questions(path: AnyPath) -> dict[str, tuple[str, list[str]]]:
    """Read ``*.qa.csv``: query_id → (question, answers). Raises: ValueError naming file and line."""
    questions: dict[str, tuple[str, list[str]]] = {}
    for number, text in read_lines(path, "DPR questions"):
        columns = [unquote(column) for column in text.split("\t")]
        if len(columns) != 2 or not columns[0].strip():
            raise line_error(path, number, f"expected 2 columns question <tab> ['answer', …], got {shorten(text)}")
        try:
            answers = ast.literal_eval(columns[1])
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            answers = None
        questions[str(len(questions))] = columns[0], _answers(path, number, answers, columns[1])
    if not questions:
        raise ValueError(f"{path}: no questions; expected lines question <tab> ['answer', …]")
    return questions


def read_answers(path: AnyPath, place: int, record: dict[str, Any]) -> list[str]:
    """Return the checked "answers" of a record."""
    return _answers(path, place, record.get("answers"), record.get("answers", "no such key"))


def find_passages(path: AnyPath) -> Path | None:
    """Return the path of ``psgs_w100.tsv``, plain or .gz; None if there is none.

    It is looked for beside ``path``, up to three folders above, and in ``wikipedia-split`` there, where UPR's download
    puts it.
    """
    for folder in list(Path(path).absolute().parents)[:4]:
        if file := Glance(folder).holds(PASSAGES, f"wikipedia-split/{PASSAGES}"):
            return file
    return None


def passages_near(path: AnyPath) -> Passages:
    """Open the passages that `find_passages` finds. Raises: FileNotFoundError if there are none."""
    file = find_passages(path)
    if file is None:
        raise FileNotFoundError(
            f"{path} holds no passages, and neither its folder nor the three above have {PASSAGES} "
            f"or wikipedia-split/{PASSAGES}, plain or .gz; put it there"
        )
    return Passages(file)


def unquote(column: str) -> str:
    """Return a tsv column as csv readers do: without enclosing quotation marks, inner ones no longer doubled."""
    inner = column[1:-1]
    if len(column) > 1 and column[0] == column[-1] == '"' and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return column


def _answers(path: AnyPath, number: int, answers: object, got: object) -> list[str]:
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise line_error(path, number, f"expected a list of texts as answers, got {shorten(got)}")
    for answer in answers:
        check_unicode(path, number, "answers", answer)
    return answers


def _id(passage: dict[str, Any]) -> str | None:
    value = passage.get("passage_id", passage.get("psg_id"))
    return str(value) if isinstance(value, (int, str)) and not isinstance(value, bool) and str(value).strip() else None


def _documents(path: AnyPath, place: int, record: dict[str, Any], key: str) -> list[dict[str, str]]:
    """Return the passages under ``key`` as documents, with an id where they have one."""
    passages = record.get(key, [] if key in _NEGATIVES else None)
    if not isinstance(passages, list) or not all(isinstance(passage, dict) for passage in passages):
        raise line_error(
            path,
            place,
            f"expected a list of passages under {key!r}, got {shorten(passages) if key in record else 'no such key'}",
        )
    documents = []
    for passage in passages:
        title = "" if passage.get("title") is None else require_text(path, place, passage, "title", empty=True)
        document = {"title": title, "text": require_text(path, place, passage, "text", empty=True)}
        if (doc_id := _id(passage)) is not None:
            check_unicode(path, place, "passage_id", doc_id)
            document = {"id": doc_id, **document}
        documents.append(document)
    return documents
