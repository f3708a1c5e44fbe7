"""Retriever output as UPR and DPR write it: questions with candidates, which know whether they hold an answer.

    [{"question", "answers", "ctxs": [{"id", "score", "has_answer"?, "title"?, "text"?}]}, …]

or an object of such records by query_id, as Pyserini writes it ("contexts" and "docid" there). Without texts the
passages come from ``psgs_w100.tsv``. UPR's own output has the same shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..utils.files import AnyPath
from ..utils.text import shorten
from . import corpus, dpr
from .answers import answer_qrels, has_answer
from .collection import Collection, Glance, plain_name
from .io import check_unicode, line_error, require_text
from .json_records import RecordPlace, read_records
from .trec import Qrels, Run


@dataclass
class Record:
    """A question with its candidates.

    Attributes:
        documents: doc_id → document; None where the file has no text.
        labels: doc_id → whether the document contains an answer; None where the file does not say.
    """

    place: RecordPlace
    query_id: str
    question: str
    answers: list[str]
    ranking: list[tuple[str, float]]
    documents: dict[str, dict[str, str] | None]
    labels: dict[str, bool | None]


class Contexts(corpus.FileCorpus):
    """The passages inside the file."""

    format = "upr"
    expected = 'records {"question", "ctxs"} with texts in "ctxs"'
    by_lines = False

    def documents(self) -> Iterator[tuple[int, corpus.Document]]:
        for record in read_file(self.path):
            for doc_id, document in record.documents.items():
                if document is None:
                    raise line_error(self.path, record.place, f"passage {doc_id!r} has no text, others have")
                yield record.place, document


class RetrieverFile(Collection):
    """One file: queries, answers, candidates, and the labels as qrels (1 for a passage that holds an answer).

    Args:
        place: the file.
        passages: the passages of its folder; None: those in the file, or where it has no texts those near it.
    """

    format = "upr"
    looks_for = 'json with "question" and "ctxs" or "contexts" (UPR or DPR retriever output)'

    def __init__(self, place: AnyPath, passages: Mapping[str, dict] | None = None) -> None:
        super().__init__(place)
        self._passages = passages

    @classmethod
    def recognises(cls, glance: Glance) -> bool:
        return glance.has("ctxs", "contexts")

    @property
    def parts(self) -> tuple[str, ...]:
        there = self._passages is not None or self._has_texts or dpr.find_passages(self.place) is not None
        return ("corpus",) * there + ("queries", "answers", "qrels", "candidates")

    @cached_property
    def corpus(self) -> Mapping[str, dict]:
        if self._passages is not None:
            return self._passages
        return Contexts(self.place) if self._has_texts else dpr.passages_near(self.place)

    def queries(self, split: str | None = None) -> dict[str, str]:
        return {query_id: question for query_id, (question, _) in self._content[0].items()}

    def answers(self, split: str | None = None) -> dict[str, list[str]]:
        return {query_id: answers for query_id, (_, answers) in self._content[0].items()}

    def candidates(self, split: str | None = None) -> Run:
        return self._content[1]

    def qrels(self, split: str | None = None) -> Qrels:
        """The labels of the file; a passage without one is labelled by DPR's matching rule.

        Raises: ValueError for such a passage that ``psgs_w100.tsv`` does not hold.
        """
        qrels = {}
        for query_id, labels in self._content[2].items():
            answers = self._content[0][query_id][1]
            qrels[query_id] = {
                doc_id: int(has_answer(self._text(query_id, doc_id), answers) if label is None else label)
                for doc_id, label in labels.items()
            }
        return qrels

    def _text(self, query_id: str, doc_id: str) -> str:
        """Return the text of a candidate without a label."""
        if doc_id not in self.corpus:
            passages = getattr(self.corpus, "path", self.place)
            raise ValueError(
                f"{self.place}: passage {doc_id!r} of query {query_id!r} is not in {passages}; "
                f"the files do not belong together"
            )
        return self.corpus[doc_id]["text"]

    def judge(self, split: str | None, runs: Sequence[Run]) -> Qrels:
        """Return the labels; unlabelled passages of ``runs`` are judged by the matching rule, if there are texts."""
        return answer_qrels(runs, self.answers(), self.corpus, self.qrels()) if "corpus" in self.parts else self.qrels()

    @cached_property
    def _has_texts(self) -> bool:
        first = next((record for record in read_file(self.place) if record.documents), None)
        return first is not None and any(document is not None for document in first.documents.values())

    @cached_property
    def _content(self) -> tuple[dict[str, tuple[str, list[str]]], Run, dict[str, dict[str, bool | None]]]:
        """Return (questions, run, labels), without the texts, by one pass over the file."""
        questions, run, labels = {}, {}, {}
        of_dpr = self._passages is not None or not self._has_texts  # the texts are those of psgs_w100.tsv
        for record in read_file(self.place, of_dpr):
            questions[record.query_id] = record.question, record.answers
            run[record.query_id] = sorted(record.ranking, key=lambda candidate: -candidate[1])  # stable
            labels[record.query_id] = record.labels
        return questions, run, labels


class Folder(Collection):
    """A folder with ``psgs_w100.tsv`` and json files, each a split: retriever output or DPR training."""

    format = "dpr folder"
    looks_for = f"a folder with {dpr.PASSAGES} (DPR, UPR)"

    @classmethod
    def recognises(cls, glance: Glance) -> bool:
        return glance.holds(dpr.PASSAGES) is not None

    @property
    def splits(self) -> list[str]:
        return sorted(self._files)

    @property
    def parts(self) -> tuple[str, ...]:
        return ("corpus", "queries", "answers", "qrels", "candidates", "examples") if self._files else ("corpus",)

    @cached_property
    def corpus(self) -> Mapping[str, dict]:
        return dpr.Passages(Glance(Path(self.place)).holds(dpr.PASSAGES) or Path(self.place, dpr.PASSAGES))

    def queries(self, split: str | None = None) -> dict[str, str]:
        return self._file(split).queries()

    def answers(self, split: str | None = None) -> dict[str, list[str]]:
        return self._file(split).answers()

    def qrels(self, split: str | None = None) -> Qrels:
        return self._file(split).qrels()

    def judge(self, split: str | None, runs: Sequence[Run]) -> Qrels | None:
        return self._file(split).judge(None, runs)

    def candidates(self, split: str | None = None) -> Run:
        return self._file(split).candidates()

    def examples(self, split: str | None = None):
        file = self._file(split)
        yield from file.examples()
        self.left_out = file.left_out

    @cached_property
    def _files(self) -> dict[str, Path]:
        return {
            plain_name(file).rsplit(".", 1)[0]: file
            for file in Path(self.place).iterdir()
            if plain_name(file).endswith((".json", ".qa.csv")) and file.is_file()
        }

    def has(self, part: str, split: str | None = None) -> bool:
        if part == "corpus":
            return True
        return super().has(part, split) and self._file(split).has(part)

    def _file(self, split: str | None) -> Collection:
        file = self._files[self.choose_split(split)]
        glance = Glance(file)
        if RetrieverFile.recognises(glance):
            return RetrieverFile(file, self.corpus)
        for format in (dpr.TrainingFile, dpr.Questions):
            if format.recognises(glance):
                return format(file)
        raise glance.error or ValueError(
            f"{file}: expected {RetrieverFile.looks_for}, {dpr.TrainingFile.looks_for} or {dpr.Questions.looks_for}"
        )


def read_file(path: AnyPath, of_dpr: bool = False) -> Iterator[Record]:
    """Yield the records of a retriever output.

    Args:
        path: the file.
        of_dpr: whether the ids are those of ``psgs_w100.tsv``, before which DPR's own scripts put "wiki:".
    Raises: ValueError naming file, line and record.
    """
    seen: set[str] = set()
    for place, key, record in read_records(path, "question", "retriever output (json)"):
        question = require_text(path, place, record, "question")
        words = question.split()
        if words[0] == "[CLS]" and words[-1] == "[SEP]":  # left over from BERT in some of UPR's files
            question = " ".join(words[1:-1])
        query_id = str(len(seen)) if key is None else key
        if query_id in seen:
            raise line_error(path, place, f"the query id {query_id!r} occurs twice; ids must be unique")
        check_unicode(path, place, "the key of the record", query_id)
        seen.add(query_id)
        passages = record.get("ctxs", record.get("contexts"))
        if not isinstance(passages, list) or not all(isinstance(passage, dict) for passage in passages):
            raise line_error(path, place, f"expected a list of passages under 'ctxs', got {shorten(passages)}")
        result = Record(place, query_id, question, dpr.read_answers(path, place, record), [], {}, {})
        for passage in passages:
            doc_id = _doc_id(path, place, passage)
            if of_dpr:
                doc_id = doc_id.removeprefix("wiki:")
            if doc_id in result.documents:
                raise line_error(path, place, f"passage {doc_id!r} occurs twice; remove one")
            result.ranking.append((doc_id, read_score(path, place, passage)))
            result.documents[doc_id] = _document(path, place, doc_id, passage)
            result.labels[doc_id] = _label(path, place, passage)
        yield result
    if not seen:
        raise ValueError(f'{path}: no questions; expected records {{"question", "answers", "ctxs"}}')


def read_score(path: AnyPath, place: int, passage: dict[str, Any]) -> float:
    """Return the finite "score" of a passage; DPR writes it as text."""
    score = passage.get("score")
    try:
        if score is None or isinstance(score, bool) or not math.isfinite(number := float(score)):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        got = shorten(score) if "score" in passage else "no such key"
        raise line_error(path, place, f"expected a finite number under 'score', got {got}") from None
    return number


def _doc_id(path: AnyPath, place: int, passage: dict[str, Any]) -> str:
    value = next((passage[key] for key in ("id", "docid", "passage_id") if key in passage), None)
    if isinstance(value, bool) or not isinstance(value, (int, str)) or not str(value).strip():
        raise line_error(path, place, f"expected a passage with an 'id', got the keys {shorten(sorted(passage))}")
    check_unicode(path, place, "id", str(value))
    return str(value)


def _document(path: AnyPath, place: int, doc_id: str, passage: dict[str, Any]) -> dict[str, str] | None:
    if passage.get("text") is None:
        return None
    text = require_text(path, place, passage, "text", empty=True)
    if passage.get("title") is not None:
        return {"id": doc_id, "title": require_text(path, place, passage, "title", empty=True), "text": text}
    title, line_end, rest = text.partition("\n")  # Pyserini: the title is the first line of the text
    return {"id": doc_id, "title": title.strip().strip('"') if line_end else "", "text": rest if line_end else text}


def _label(path: AnyPath, place: int, passage: dict[str, Any]) -> bool | None:
    label = passage.get("has_answer")
    if label is not None and label not in (True, False):
        raise line_error(path, place, f"expected true or false under 'has_answer', got {shorten(label)}")
    return None if label is None else bool(label)
