"""Training examples → groups of queries that share their documents, as tables over distinct query–document pairs.

An example is ``{"query_id"?, "query", "positives": [document], "negatives": [document]}``; for distillation it has a
teacher's scores, ``"positive_scores"`` and ``"negative_scores"``, a number for each document. The keys of other
libraries are read too (`formats.example_keys`). What a query meets in an epoch is a pure function of (seed, epoch,
example index), so that a resumed run sees the same data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Sampler

from ..config import QPeftConfig
from ..formats.example_keys import view
from ..prompts.pairs import PairBatch, paired_documents
from ..prompts.prompt import Document, Prompt, document_text

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
            raise ValueError(f"{where}: {key[:-1]}_scores must be a finite number for each of the {len(example[key])} "
                             f"{key}, got {str(scores)[:60]}")
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
    line = (f"{without} of {len(examples)} training examples have no negatives{none_drawn}, and loss={config.loss!r} "
            "compares with them: give them negatives, or set in_batch_negatives=True with queries_per_group of 2 or "
            "more, or num_random_negatives")
    if without == len(examples) and config.loss != "pointwise_pairwise":
        raise ValueError(line)
    return line if without else ""


def _are_numbers(scores: object, count: int) -> bool:
    return (isinstance(scores, Sequence) and not isinstance(scores, str) and len(scores) == count
            and all(isinstance(score, Real) and math.isfinite(score) for score in scores))


def whole_member(example: Mapping, index: int, what: str = EVALUATION) -> Member:
    """All positives and all negatives of an example: what evaluation ranks."""
    check_example(example, index, what)
    positives, negatives = (_identified(example, key) for key in ("positives", "negatives"))
    return Member(index, example["query"], example.get("query_id"), positives, negatives, positives)


def _identified(example: Mapping, key: str) -> list[IdentifiedDocument]:
    scores = example.get(f"{key[:-1]}_scores")
    return [IdentifiedDocument.of(document, math.nan if scores is None else float(scores[i]))
            for i, document in enumerate(example[key])]


def drawn_member(example: Mapping, index: int, epoch: int, num_hard_negatives: int, seed: int,
                 known_positives: Iterable[IdentifiedDocument] = ()) -> Member:
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


class TrainingExamples(Dataset):
    """Map-style examples; an item is asked for by (epoch, index), as `EpochOrder` yields them; −1 is an idle one.

    num_random_negatives: documents of other examples that a member brings besides; see `OtherExamples`.
    """

    def __init__(self, examples: Sequence, num_hard_negatives: int, seed: int, num_random_negatives: int = 0) -> None:
        self.examples, self.num_hard_negatives, self.seed = view(examples, TRAINING), num_hard_negatives, seed
        self.num_random_negatives, self.others = num_random_negatives, OtherExamples(self.examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, key: tuple[int, int]) -> Member:
        epoch, index = key
        place = max(0, index)
        known = self.others.known_positives(place)
        member = drawn_member(self.examples[place], place, epoch, self.num_hard_negatives, self.seed, known)
        draw = np.random.default_rng([self.seed, epoch, place, 1])
        member.negatives += self.others.random_negatives(member, self.num_random_negatives, draw)
        return replace(member, idle=index < 0)


class OtherExamples:
    """What the rest of the examples says about one of them: further positives of its query, and random negatives.

    Examples of one query, by id or normalised text, are known where looking is cheap: in a list or a
    `datasets.Dataset`.
    """

    def __init__(self, examples: Sequence) -> None:
        self.examples = examples
        places: dict[object, list[int]] = {}
        for index, key in enumerate(_query_keys(examples)):
            places.setdefault(key, []).append(index)
        self._same_query = {index: same for same in places.values() if len(same) > 1 for index in same}

    def known_positives(self, index: int) -> list[IdentifiedDocument]:
        others = (i for i in self._same_query.get(index, ()) if i != index)
        return [IdentifiedDocument.of(document) for i in others for document in self.examples[i]["positives"]]

    def random_negatives(self, member: Member, count: int, draw: np.random.Generator) -> list[IdentifiedDocument]:
        """Up to ``count`` documents of other examples that are neither relevant nor drawn already."""
        taken, found = DocumentSet((*member.relevant, *member.negatives)), []
        for _ in range(8 * count):  # tries: in a small set there may be nothing left to draw
            if len(found) == count:
                break
            other = self.examples[int(draw.integers(len(self.examples)))]
            documents = [*other["positives"], *other["negatives"]]
            document = IdentifiedDocument.of(documents[draw.integers(len(documents))])
            if document.text and document not in taken:
                taken.add(document)
                found.append(document)
        return found


def _query_keys(examples: Sequence) -> Iterator[object]:
    """What says that two examples have the same query: the id, or else the normalised text."""
    if isinstance(examples, (list, tuple)):
        queries: Iterable = ((example.get("query_id"), example["query"]) for example in examples)
    else:
        queries = examples.queries()
    return (("id", query_id) if query_id is not None else normalised(query) for query_id, query in queries)


class EpochOrder(Sampler):
    """(epoch, index) of every example, in an order that is a pure function of (seed, epoch).

    multiple: filled up with idle items, (epoch, −1), to a multiple of this: the global batch. Otherwise accelerate
        would fill up the last one with examples of the beginning, which then count twice.
    """

    def __init__(self, length: int, seed: int, shuffle: bool = True, multiple: int = 1) -> None:
        self.length, self.seed, self.shuffle, self.multiple = length, seed, shuffle, multiple
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length + -self.length % self.multiple

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, order = self.epoch, range(self.length)
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
        yield from ((epoch, int(index)) for index in order)
        yield from [(epoch, -1)] * (-self.length % self.multiple)


class StreamedTrainingExamples(IterableDataset):
    """Examples of an iterable in its own order, pass after pass without end (``max_steps`` ends the training).

    Being endless it has one epoch for the trainer, so that a resumed run skips exactly what was read, over any number
    of passes.
    """

    def __init__(self, examples: Iterable, num_hard_negatives: int, seed: int, num_random_negatives: int = 0) -> None:
        if num_random_negatives:
            raise ValueError(f"num_random_negatives={num_random_negatives} needs examples in a list or a "
                             "datasets.Dataset: an iterable has no other examples to draw from")
        self.examples, self.num_hard_negatives, self.seed = view(examples, TRAINING), num_hard_negatives, seed

    def __iter__(self) -> Iterator[Member]:
        epoch = 0
        while True:
            if hasattr(self.examples, "set_epoch"):
                self.examples.set_epoch(epoch)
            index = -1
            for index, example in enumerate(self.examples):
                yield drawn_member(example, index, epoch, self.num_hard_negatives, self.seed)
            if index < 0:
                raise ValueError("the training examples are an iterable that yields nothing (the second time, perhaps: "
                                 "a generator can be read once only)" if epoch else "there are no training examples")
            epoch += 1


class EvaluationExamples(Dataset):
    """Map-style examples; an item is asked for as of `TrainingExamples`."""

    def __init__(self, examples: Sequence) -> None:
        self.examples = view(examples, EVALUATION)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, key: tuple[int, int]) -> Member:
        _, index = key
        return replace(whole_member(self.examples[max(0, index)], index), idle=index < 0)


class StreamedEvaluationExamples(IterableDataset):
    """Examples of an iterable, filled up with idle ones to a ``multiple``; see `EpochOrder`."""

    def __init__(self, examples: Iterable, multiple: int = 1) -> None:
        self.examples, self.multiple = view(examples, EVALUATION), multiple

    def __iter__(self) -> Iterator[Member]:
        index, member = -1, None
        for index, example in enumerate(self.examples):
            member = whole_member(example, index)
            yield member
        if member:
            yield from [replace(member, idle=True)] * (-(index + 1) % self.multiple)


def documents_of_each(members: Sequence[Member], in_batch_negatives: bool) -> Iterator[tuple[Member, list, list]]:
    """(member, its positives, its negatives) for one group.

    A negative is a document of its own or, with ``in_batch_negatives``, of another query of the group, unless it is
    relevant: one of the query's positives, by id or by normalised text. A query that occurs twice has the positives
    of both.
    """
    for member in members:
        relevant = DocumentSet(d for other in members if other.same_query(member) for d in other.relevant)
        offered = list(member.negatives)
        if in_batch_negatives:
            offered += [d for other in members if other is not member for d in (*other.positives, *other.negatives)]
        yield member, _distinct(member.positives), _distinct(d for d in offered if d not in relevant)


def _distinct(documents: Iterable[IdentifiedDocument]) -> list[IdentifiedDocument]:
    seen, kept = DocumentSet(), []
    for document in documents:
        if document not in seen:
            seen.add(document)
            kept.append(document)
    return kept


class GroupCollator:
    """Members → the distinct pairs to score, and the tables that the losses read.

    Args:
        prompt: `Prompt` of the model.
        queries_per_group: consecutive members that share their documents; 1 in evaluation.
        in_batch_negatives: whether they do.
        needs_scores: whether every document must have a teacher score.
        truncate_queries: whether queries that are too long are cut, instead of an error.
    """

    def __init__(
        self, prompt: Prompt, queries_per_group: int, in_batch_negatives: bool, needs_scores: bool = False,
        truncate_queries: bool = False,
    ) -> None:
        self.prompt, self.queries_per_group, self.in_batch_negatives = prompt, queries_per_group, in_batch_negatives
        self.needs_scores, self.truncate_queries = needs_scores, truncate_queries

    def __call__(self, members: Sequence[Member]) -> dict:
        """Tables over Q queries and up to M documents each.

        Returns: dict of positive, mask [Q, M] bool; pair [Q, M] int64, the row of `PairBatch`; document [Q, M] int64,
            equal where two queries of a group meet the same document; teacher_scores [Q, M] float32, NaN where there
            is none; pairs: `PairBatch`, where the candidates of a query are the documents of its own examples;
            queries: how many count, Q, or 0 for a batch of idle members, which still has one to run on.
        Raises: ValueError for a missing teacher score or a query that is too long.
        """
        busy = [member for member in members if not member.idle]
        queries, members = len(busy), busy or members[:1]
        distinct: dict[tuple[str, str], int] = {}  # (query, document text) -> row
        pairs, rows, own_rows = [], [], []
        for start in range(0, len(members), self.queries_per_group):
            group = members[start : start + self.queries_per_group]
            for member, positives, negatives in documents_of_each(group, self.in_batch_negatives):
                row, own = [], DocumentSet((*member.positives, *member.negatives))
                for document in (*positives, *negatives):
                    key = member.query, document_text(document.document)
                    if key not in distinct:
                        distinct[key] = len(pairs)
                        pairs.append((member.query, document.document))
                    row.append(distinct[key])
                    if document in own:
                        own_rows.append(distinct[key])
                scores = [document.teacher_score for document in (*positives, *negatives)]
                if self.needs_scores and any(map(math.isnan, scores)):
                    raise ValueError(f"example {member.index}: loss='margin_mse' needs a teacher score for each "
                                     "document: positive_scores and negative_scores")
                rows.append((row, len(positives), start, scores))
        batch = self._encode(pairs, members)
        batch.candidates = paired_documents([batch.pairs[row] for row in own_rows], len(batch.queries))
        shape = len(rows), max(len(row) for row, *_ in rows)
        pair, document, mask, positive = (torch.zeros(shape, dtype=dtype)
                                          for dtype in (torch.long, torch.long, torch.bool, torch.bool))
        teacher_scores = torch.full(shape, math.nan, dtype=torch.float32)
        for q, (row, num_positives, group_start, scores) in enumerate(rows):
            pair[q, : len(row)] = torch.tensor(row)
            mask[q, : len(row)] = True
            positive[q, :num_positives] = True
            teacher_scores[q, : len(row)] = torch.tensor(scores)
            # groups share nothing: a document that two of them have counts as two
            document[q, : len(row)] = torch.tensor([batch.pairs[i][1] for i in row])
            document[q] += group_start * len(batch.documents)
        return {"positive": positive, "mask": mask, "pair": pair, "document": document,
                "teacher_scores": teacher_scores, "pairs": batch, "queries": queries}

    def _encode(self, pairs: list[tuple[str, Document]], members: Sequence[Member]) -> PairBatch:
        try:
            return PairBatch.from_text(self.prompt, pairs, truncate_queries=self.truncate_queries)
        except ValueError:
            for member in members:  # a query that is too long: say whose
                try:
                    self.prompt.queries([member.query], [] if self.truncate_queries else None)
                except ValueError as error:
                    raise ValueError(f"example {member.index}: {error}") from None
            raise
