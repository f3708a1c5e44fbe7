"""Training examples, and the queries with their documents that are drawn from them.

An example is ``{"query_id"?, "query", "positives": [document], "negatives": [document]}``; for distillation it has a
teacher's scores, ``"positive_scores"`` and ``"negative_scores"``, a number for each document. The keys of other
libraries are read too (`formats.example_keys`). What a query meets in an epoch is a pure function of (seed, epoch,
example index), so that a resumed run sees the same data.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

from ..config import DISTILLATION, QPeftConfig
from ..formats.example_keys import table_rows, view
from ..prompts.prompt import Document, document_text
from ..utils.words import counted

logger = logging.getLogger(__name__)

TRAINING, EVALUATION = "training example", "evaluation example"  # in messages


@dataclass(frozen=True)
class IdentifiedDocument:
    """A document and what it is recognised by.

    Attributes:
        document: as in the example.
        id: its id, None without one.
        text: its normalised text.
        teacher_score: the score that a teacher gives it for the query; NaN without one.
    """

    document: Document
    id: object
    text: str
    teacher_score: float = math.nan

    @classmethod
    def from_document(cls, document: Document, teacher_score: float = math.nan) -> IdentifiedDocument:
        doc_id = document.get("id") if isinstance(document, Mapping) else None
        return cls(document, doc_id, normalised(document_text(document)), teacher_score)


class DocumentSet:
    """Documents by id or normalised text: two texts that differ in spaces or case are one document."""

    def __init__(self, documents: Iterable[IdentifiedDocument] = ()) -> None:
        self.ids: set[object] = set()
        self.texts: set[str] = set()
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

    Attributes:
        index: the index of its example.
        query, query_id: its text, and its id or None.
        positives, negatives: the documents that it adds to the group.
        relevant: all positives of its example, and those of the same query in other examples.
        idle: it only fills up a batch, so that every rank has as many batches as the others; it is not counted.
    """

    index: int
    query: str
    query_id: object
    positives: list[IdentifiedDocument]
    negatives: list[IdentifiedDocument]
    relevant: list[IdentifiedDocument] = field(repr=False)
    idle: bool = False

    def same_query(self, other: Member) -> bool:
        """Return whether both have one query, by its id or its normalised text."""
        same_id = self.query_id is not None and self.query_id == other.query_id
        return same_id or normalised(self.query) == normalised(other.query)


def normalised(text: str) -> str:
    """Return the text in one case and with single spaces, for comparison."""
    return " ".join(text.casefold().split())


def check_example(example: object, index: int, what: str = TRAINING) -> None:
    """Check the keys and the types of one example.

    Raises: ValueError that names the example and what is wrong with it.
    """
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


def is_sized(dataset: object) -> bool:
    """Return whether examples can be asked for by their index."""
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")


def checked_dataset(dataset: Any, what: str, config: QPeftConfig | None = None) -> Any:
    """Return a data set whose rows are examples.

    Every example of a list is checked now; those of other data sets are checked when they are read. One that is read by
    index, and from which nothing can be learned, is found now too.

    Args:
        dataset: a list, a `datasets.Dataset`, an iterable, or None; or a dict of them.
        what: `TRAINING` or `EVALUATION`, for messages.
        config: given for a data set to train on, whose examples need the negatives that the config's loss compares
            with.
    Raises: ValueError for a data set that cannot be read again, is empty, or has a bad example.
    """
    if isinstance(dataset, dict):
        return {name: checked_dataset(part, what, config) for name, part in dataset.items()}
    dataset = table_rows(dataset)
    if dataset is None:
        return None
    if not is_sized(dataset):
        if not hasattr(dataset, "__iter__") or hasattr(dataset, "__next__"):
            raise ValueError(
                f"QPeftTrainer: {what}s must be a list, a datasets.Dataset or an iterable that can be "
                f"read again, got a {type(dataset).__name__}"
            )
        return dataset
    if not len(dataset):
        raise ValueError(f"QPeftTrainer: there are no {what}s")
    if isinstance(dataset, (list, tuple)):
        examples = view(dataset, what)
        for index, example in enumerate(examples):
            check_example(example, index, what)
    elif config is None or _learns_from_some(dataset, config):
        return dataset  # reading all of it may take long
    else:
        examples = view(dataset, what)
    if config is not None and (lacking := lacking_negatives(examples, config)):
        logger.warning("%s", lacking)
    return dataset


def _learns_from_some(dataset: Any, config: QPeftConfig) -> bool:
    """Return whether the loss has something to compare with in any example; the first such ends the search."""
    if not _compares_with_own(config):
        return True
    examples = (example for example in view(dataset, TRAINING) if isinstance(example, Mapping))
    return bool(config.num_hard_negatives) and any(example["negatives"] for example in examples)


def _compares_with_own(config: QPeftConfig) -> bool:
    """Return whether the loss of a config compares a query's positives with negatives of its own example only."""
    others = config.num_random_negatives or config.in_batch_negatives and config.queries_per_group > 1
    return not (others or config.loss == "pointwise")


def lacking_negatives(examples: Sequence, config: QPeftConfig) -> str:
    """Say how many examples lack the negatives that the loss of ``config`` compares with; "" if none does.

    Raises: ValueError with that line if all of them do: there is nothing to learn.
    """
    if not _compares_with_own(config):
        return ""
    none_drawn = "" if config.num_hard_negatives else " (num_hard_negatives=0)"
    without = len(examples) if none_drawn else sum(not example["negatives"] for example in examples)
    others = ", or set in_batch_negatives=True with queries_per_group of 2 or more, or num_random_negatives"
    line = (
        f"{without} of {counted(len(examples), 'training examples')} {'has' if without == 1 else 'have'} no "
        f"negatives{none_drawn}, and loss={config.loss!r} "
        f"compares with them: give them negatives{'' if config.loss in DISTILLATION else others}"
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
    """Return the query of an example with all its positives and all its negatives, which evaluation ranks."""
    check_example(example, index, what)
    positives, negatives = (_identified(example, key) for key in ("positives", "negatives"))
    return Member(index, example["query"], example.get("query_id"), positives, negatives, positives)


def _identified(example: Mapping, key: str) -> list[IdentifiedDocument]:
    scores = example.get(f"{key[:-1]}_scores")
    return [
        IdentifiedDocument.from_document(document, math.nan if scores is None else float(scores[i]))
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
    """Draw one positive and up to ``num_hard_negatives`` negatives, decided by (seed, epoch, index) only.

    Args:
        example: its positives and negatives are drawn from.
        index: its place among the examples.
        epoch, seed: of the draw.
        num_hard_negatives: how many negatives, if it has as many.
        known_positives: positives of the same query in other examples, which are no negatives either.
    """
    member = whole_member(example, index, TRAINING)
    member.relevant = [*member.relevant, *known_positives]
    draw = np.random.default_rng([seed, epoch, index])
    relevant = DocumentSet(member.relevant)
    pool = [document for document in member.negatives if document not in relevant]
    member.positives = [member.positives[draw.integers(len(member.positives))]]
    if pool:
        pool = [pool[i] for i in draw.choice(len(pool), min(num_hard_negatives, len(pool)), replace=False)]
    member.negatives = pool
    return member
