"""Training examples → groups of queries that share their documents, as tables over distinct query–document pairs.

An example is ``{"query_id"?, "query", "positives": [document], "negatives": [document]}``; for distillation it has a
teacher's scores, ``"positive_scores"`` and ``"negative_scores"``, a number for each document. The keys of other
libraries are read too (`formats.example_keys`). What a query meets in an epoch is a pure function of (seed, epoch,
example index), so that a resumed run sees the same data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real

import numpy as np

from ..config import QPeftConfig
from ..prompts.prompt import Document, document_text

TRAINING, EVALUATION = "training example", "evaluation example"  # how errors call them


@dataclass(frozen=True)
class IdentifiedDocument:
    """A document and what it is recognised by: its id (None without one) and its normalised text.

    teacher_score: what a teacher gives it for the query; NaN without one.
    """

    document: Document
    id: object
    text: str
    teacher_score: float = math.nan

    @classmethod
    def of(cls, document: Document, teacher_score: float = math.nan) -> IdentifiedDocument:
        doc_id = document.get("id") if isinstance(document, Mapping) else None
        return cls(document, doc_id, normalised(document_text(document)), teacher_score)


class DocumentSet:
    """Documents by id or normalised text: two texts that differ in spaces or case are one document."""

    def __init__(self, documents: Iterable[IdentifiedDocument] = ()) -> None:
        self.ids, self.texts = set(), set()
        for document in documents:
            self.add(document)

    def add(self, document: IdentifiedDocument) -> None:
        if document.id is not None:
            self.ids.add(document.id)
        self.texts.add(document.text)

    def __contains__(self, document: IdentifiedDocument) -> bool:
        return document.text in self.texts or (document.id is not None and document.id in self.ids)


@dataclass
class Member:
    """One query of a group.

    index: of its example.  positives, negatives: what it brings along.  relevant: all positives of its example.
    idle: it only fills up a batch, so that every rank has as many batches as the others; it counts nothing.
    """

    index: int
    query: str
    query_id: object
    positives: list[IdentifiedDocument]
    negatives: list[IdentifiedDocument]
    relevant: list[IdentifiedDocument] = field(repr=False)
    idle: bool = False

    def same_query(self, other: Member) -> bool:
        same_id = self.query_id is not None and self.query_id == other.query_id
        return same_id or normalised(self.query) == normalised(other.query)


def normalised(text: str) -> str:
    return " ".join(text.casefold().split())


def check_example(example: object, index: int, what: str = TRAINING) -> None:
    """Raises: ValueError that names the example and what is wrong with it."""
    where = f"{what} {index}"
    if not isinstance(example, Mapping):
        raise ValueError(f"{where}: expected a dict with query, positives and negatives, got {type(example).__name__}")
    missing = [key for key in ("query", "positives", "negatives") if key not in example]
    if missing:
        has = ", ".join(map(str, example)) or "none"
        raise ValueError(f"{where}: missing keys: {', '.join(missing)}; it has {has}")
    if not isinstance(example["query"], str) or not example["query"].strip():
        raise ValueError(f"{where}: query must be a text that is not empty, got {example['query']!r}")
    for key in ("positives", "negatives"):
        if isinstance(example[key], (str, Mapping)) or not isinstance(example[key], Sequence):
            raise ValueError(f"{where}: {key} must be a list of documents, got {type(example[key]).__name__}")
        for document in example[key]:
            try:
                empty = not document_text(document)
            except TypeError as error:
                raise ValueError(f"{where}: {key}: {error}") from None
            if empty and key == "positives":
                raise ValueError(f"{where}: a positive document has no text")
        scores = example.get(f"{key[:-1]}_scores")
        if scores is not None and not _are_numbers(scores, len(example[key])):
            raise ValueError(
                f"{where}: {key[:-1]}_scores must be a finite number for each of the {len(example[key])} "
                f"{key}, got {str(scores)[:60]}"
            )
    if not len(example["positives"]):
        raise ValueError(f"{where} ({example['query'][:60]!r}): positives is empty, expected at least one document")


def lacking_negatives(examples: Sequence, config: QPeftConfig) -> str:
    """A line on examples that have no negatives, where their loss compares and nothing else gives them any; or "".

    Raises: ValueError with that line if no example has one: there is nothing to learn.
    """
    others = config.num_random_negatives or config.in_batch_negatives and config.queries_per_group > 1
    if others or config.loss == "pointwise":
        return ""
    none_drawn = "" if config.num_hard_negatives else " (num_hard_negatives=0)"
    without = len(examples) if none_drawn else sum(not example["negatives"] for example in examples)
    line = (
        f"{without} of {len(examples)} training examples have no negatives{none_drawn}, and loss={config.loss!r} "
        "compares with them: give them negatives, or set in_batch_negatives=True with queries_per_group of 2 or "
        "more, or num_random_negatives"
    )
    if without == len(examples) and config.loss != "pointwise_pairwise":
        raise ValueError(line)
    return line if without else ""


def _are_numbers(scores: object, count: int) -> bool:
    return (
        isinstance(scores, Sequence)
        and not isinstance(scores, str)
        and len(scores) == count
        and all(isinstance(score, Real) and math.isfinite(score) for score in scores)
    )


def whole_member(example: Mapping, index: int, what: str = EVALUATION) -> Member:
    """All positives and all negatives of an example: what evaluation ranks."""
    check_example(example, index, what)
    positives, negatives = (_identified(example, key) for key in ("positives", "negatives"))
    return Member(index, example["query"], example.get("query_id"), positives, negatives, positives)


def _identified(example: Mapping, key: str) -> list[IdentifiedDocument]:
    scores = example.get(f"{key[:-1]}_scores")
    return [
        IdentifiedDocument.of(document, math.nan if scores is None else float(scores[i]))
        for i, document in enumerate(example[key])
    ]


def drawn_member(
    example: Mapping,
    index: int,
    epoch: int,
    num_hard_negatives: int,
    seed: int,
    known_positives: Iterable[IdentifiedDocument] = (),
) -> Member:
    """One positive and up to ``num_hard_negatives`` negatives, drawn by (seed, epoch, index) alone.

    known_positives: positives of the same query in other examples, which are no negatives either.
    """
    member = whole_member(example, index, TRAINING)
    member.relevant = [*member.relevant, *known_positives]
    draw = np.random.default_rng([seed, epoch, index])
    relevant = DocumentSet(member.relevant)
    pool = [document for document in member.negatives if document not in relevant]
    member.positives = [member.positives[draw.integers(len(member.positives))]]
    chosen = draw.choice(len(pool), min(num_hard_negatives, len(pool)), replace=False) if pool else []
    member.negatives = [pool[i] for i in chosen]
    return member
