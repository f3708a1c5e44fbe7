"""The examples that make up a batch, and their order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset, Sampler

from ..config import QPeftConfig
from ..formats.example_keys import view
from .examples import (
    EVALUATION,
    TRAINING,
    DocumentSet,
    IdentifiedDocument,
    Member,
    drawn_member,
    is_sized,
    normalised,
    whole_member,
)


class TrainingExamples(Dataset):
    """Training examples by (epoch, index), as `EpochOrder` yields them; index −1 is an idle one.

    Args:
        examples: a list or a `datasets.Dataset`.
        num_hard_negatives: documents that are drawn from the example's own negatives.
        seed: of the draws.
        num_random_negatives: documents of other examples that are added; see `OtherExamples`.
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
    """Further positives of an example's query, and random negatives for it, from the rest of the examples.

    Examples of one query, by id or normalised text as in `Member.same_query`, are known where looking is cheap: in a
    list or a `datasets.Dataset`.
    """

    def __init__(self, examples: Sequence) -> None:
        self.examples = examples
        self._places: dict[object, list[int]] = {}  # of each id and each text that several examples have
        first: dict[object, int] = {}
        for index, keys in enumerate(_query_keys(examples)):
            for key in keys:
                if (earlier := first.setdefault(key, index)) != index:
                    self._places.setdefault(key, [earlier]).append(index)
        self._keys: dict[int, list[object]] = {}
        for key, places in self._places.items():
            for index in places:
                self._keys.setdefault(index, []).append(key)

    def known_positives(self, index: int) -> list[IdentifiedDocument]:
        """Return the positives that other examples have for the query of this one."""
        same = dict.fromkeys(i for key in self._keys.get(index, ()) for i in self._places[key])
        return [
            IdentifiedDocument.from_document(document)
            for i in same
            if i != index
            for document in self.examples[i]["positives"]
        ]

    def random_negatives(self, member: Member, count: int, draw: np.random.Generator) -> list[IdentifiedDocument]:
        """Draw up to ``count`` documents of other examples that are neither relevant nor drawn already."""
        taken = DocumentSet((*member.relevant, *member.negatives))
        found: list[IdentifiedDocument] = []
        for _ in range(8 * count):  # tries: in a small set there may be nothing left to draw
            if len(found) == count:
                break
            other = self.examples[int(draw.integers(len(self.examples)))]
            documents = [*other["positives"], *other["negatives"]]
            document = IdentifiedDocument.from_document(documents[draw.integers(len(documents))])
            if document.text and document not in taken:
                taken.add(document)
                found.append(document)
        return found


def _query_keys(examples: Sequence) -> Iterator[list[object]]:
    """Yield what makes two examples ones of the same query if they share it: the id, and the normalised text."""
    if hasattr(examples, "queries"):  # a data set that can read these columns without the documents
        queries: Iterable = examples.queries()
    else:
        queries = ((example.get("query_id"), example["query"]) for example in examples)
    for query_id, query in queries:
        yield [normalised(query)] if query_id is None else [normalised(query), ("id", query_id)]


class EpochOrder(Sampler):
    """Yields (epoch, index) of every example, in an order that is a pure function of (seed, epoch).

    Args:
        length: how many examples there are.
        seed: of the order.
        shuffle: False yields them in their own order.
        multiple: idle items, (epoch, −1), are added up to a multiple of this, the global batch. Otherwise accelerate
            would fill up the last batch with examples of the beginning, which then count twice.
    """

    def __init__(self, length: int, seed: int, shuffle: bool = True, multiple: int = 1) -> None:
        self.length, self.seed, self.shuffle, self.multiple = length, seed, shuffle, multiple
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length + -self.length % self.multiple

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, order = self.epoch, np.arange(self.length)
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
        yield from ((epoch, int(index)) for index in order)
        yield from [(epoch, -1)] * (-self.length % self.multiple)


class StreamedTrainingExamples(IterableDataset):
    """Training examples of an iterable in its own order, pass after pass without end (``max_steps`` ends the training).

    Being endless it has one epoch for the trainer, so that a resumed run skips exactly what was read, over any number
    of passes.
    """

    def __init__(self, examples: Iterable, num_hard_negatives: int, seed: int, num_random_negatives: int = 0) -> None:
        if num_random_negatives:
            raise ValueError(
                f"num_random_negatives={num_random_negatives} needs examples in a list or a "
                "datasets.Dataset: an iterable has no other examples to draw from"
            )
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
                raise ValueError(
                    "the training examples are an iterable that yields nothing (the second time, perhaps: "
                    "a generator can be read once only)"
                    if epoch
                    else "there are no training examples"
                )
            epoch += 1


def first_members(dataset: Any, config: QPeftConfig, seed: int, shuffle: bool, count: int) -> list[Member]:
    """The first ``count`` queries, with their documents, that a training on ``dataset`` begins with."""
    if not is_sized(dataset):
        return list(islice(StreamedTrainingExamples(dataset, config.num_hard_negatives, seed), count))
    examples = TrainingExamples(dataset, config.num_hard_negatives, seed, config.num_random_negatives)
    return [examples[key] for key in islice(EpochOrder(len(dataset), seed, shuffle), count)]


class EvaluationExamples(Dataset):
    """Evaluation examples by (epoch, index), like `TrainingExamples`."""

    def __init__(self, examples: Sequence) -> None:
        self.examples = view(examples, EVALUATION)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, key: tuple[int, int]) -> Member:
        _, index = key
        return replace(whole_member(self.examples[max(0, index)], index), idle=index < 0)


class StreamedEvaluationExamples(IterableDataset):
    """Evaluation examples of an iterable, filled up with idle ones to a ``multiple``; see `EpochOrder`."""

    def __init__(self, examples: Iterable, multiple: int = 1) -> None:
        self.examples, self.multiple = view(examples, EVALUATION), multiple

    def __iter__(self) -> Iterator[Member]:
        index, member = -1, None
        for index, example in enumerate(self.examples):
            member = whole_member(example, index)
            yield member
        if member:
            yield from [replace(member, idle=True)] * (-(index + 1) % self.multiple)
