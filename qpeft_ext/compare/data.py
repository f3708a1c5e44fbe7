"""The data that all methods of a comparison share: test queries, candidates, training examples and dev queries."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TypeVar

from .. import formats
from ..formats.trec import Qrels, Run
from ..prompts.prompt import Prompt
from ..ranking.first_stage import asked_queries, first_stage
from ..ranking.run import check_candidates
from .plan import Collection, Source, Training

Item = TypeVar("Item")
SAMPLE_SEED = 0  # of test and dev queries, which are the same for all seeds of a plan


@dataclass
class Ranked:
    """Queries with the candidates that are reranked for them.

    Attributes:
        queries: query_id -> text.
        qrels: their judgements.
        candidates: the first stage's run.
        corpus: doc_id -> document.
        first_stage: name of the first stage.
    """

    queries: dict[str, str]
    qrels: Qrels
    candidates: Run
    corpus: Mapping[str, dict]
    first_stage: str

    @cached_property
    def digest(self) -> str:
        """Fingerprint of everything that a method's ranking and its evaluation depend on.

        It is made of the texts, not of their files: a copy of the data is the same data.
        """
        content = [
            [q, text, self.qrels[q], [d for d, _ in self.candidates.get(q, ())]] for q, text in self.queries.items()
        ]
        texts = hashlib.sha256()
        for doc_id in sorted({d for found in self.candidates.values() for d, _ in found}):
            texts.update(digest(self.corpus[doc_id]).encode())
        return digest([content, texts.hexdigest()])


class CollectionData:
    """The data of one collection of a plan.

    Args:
        collection: what the plan says of it.
        root: folder that paths of the plan are below.
        prompt: decides which queries are too long.

    Attributes:
        test: the test queries.

    Raises: ValueError or OSError, one line, for data that cannot be read or do not belong together.
    """

    def __init__(self, collection: Collection, root: Path, prompt: Prompt) -> None:
        self.collection, self._root, self._prompt = collection, root, prompt
        self._examples = cache(self._read_examples)
        c = collection
        self.test = self._ranked(Source(c.data, c.split, c.run, c.queries), c.candidates, SAMPLE_SEED, set())

    @cached_property
    def dev(self) -> Ranked:
        """Queries that weights are chosen on; none of them is a test query."""
        if self.collection.dev is None:
            raise ValueError(f"collection {self.collection.name!r}: the key 'dev' is missing")
        return self._ranked(self.collection.dev, self.collection.candidates, SAMPLE_SEED, self._taken(dev=False))

    def examples(self, which: str, training: Training, seed: int) -> list[dict]:
        """Return training examples; the queries, their negatives and their order depend on the seed.

        No test or dev query is among them. The examples of fewer queries are among those of more.

        Args:
            which: "train" or "synthetic".
            training: how many queries, and their negatives.
            seed: seed of the samples.

        Raises: ValueError if the collection has too few.
        """
        return self._examples(which, training.queries, training.negatives, training.depth, seed)

    def _read_examples(self, which: str, count: int, negatives: int, depth: int, seed: int) -> list[dict]:
        source: Source = getattr(self.collection, which)
        count = min(count, source.queries or count)
        taken = self._taken(dev=True)
        if source.examples:
            path = self._root / source.examples
            found = [
                example
                for example in formats.read_examples(path)
                if self._prompt.fits(example["query"]) and example["query"] not in taken
            ]
            chosen = sorted(_sample(range(len(found)), count, seed))
            examples = [found[i] for i in chosen]
            place = str(path)
        else:
            data, queries, qrels = self._sampled(source, count, seed, taken, with_relevant=True)
            most = depth + max((len(judged) for judged in qrels.values()), default=0)
            run = self._root / source.run if source.run else None
            candidates, _ = first_stage(data, source.split, queries, run, most)
            examples, _ = formats.training_examples(
                queries, qrels, candidates, data.corpus, num_negatives=negatives, depth=depth, seed=seed
            )
            place = f"{data.place}, split {source.split}"
        if len(examples) < count:
            raise ValueError(
                f"{place}: {count} training queries were asked for, there are {len(examples)} that are "
                f"judged, fit the prompt and are no test or dev queries; {which}.queries of the "
                "collection can say how many it has"
            )
        return examples

    def _taken(self, dev: bool) -> set[str]:
        """Return the texts of the test queries, and with ``dev`` of the dev queries, which nothing is trained on.

        Texts are compared, since the same query may have another id in another file.
        """
        return {*self.test.queries.values(), *(self.dev.queries.values() if dev and self.collection.dev else ())}

    def _sampled(
        self, source: Source, count: int | None, seed: int, taken: set[str], with_relevant: bool = False
    ) -> tuple[formats.Collection, dict[str, str], Qrels]:
        """Sample queries of a source that are judged, fit the prompt and are not ``taken``.

        Args:
            count: how many; None: all.
            with_relevant: only queries with a relevant document.

        Returns: the collection, the queries and their qrels.
        """
        if source.data is None:
            raise ValueError("expected data: a collection, and not examples")
        data = formats.open_collection(_place(self._root, source.data))
        split = data.choose_split(source.split) if data.splits else None
        judged = data.qrels(split)
        fitting = {
            q: text
            for q, text in asked_queries(data, split).items()
            if q in judged
            and text not in taken
            and (not with_relevant or max(judged[q].values()) > 0)
            and self._prompt.fits(text)
        }
        queries = {q: fitting[q] for q in sorted(_sample(sorted(fitting), count, seed))}
        return data, queries, {q: judged[q] for q in queries}

    def _ranked(self, source: Source, candidates: int, seed: int, taken: set[str]) -> Ranked:
        """Sample queries of a source, with the best ``candidates`` of the first stage."""
        data, queries, qrels = self._sampled(source, source.queries, seed, taken)
        if not queries:
            raise ValueError(f"{data.place}, split {source.split}: no judged query is left")
        run = self._root / source.run if source.run else None
        found, name = first_stage(data, source.split, queries, run, candidates)
        found = {q: found[q] for q in queries if found.get(q)}
        check_candidates(found, queries, data.corpus, run)
        return Ranked(queries, qrels, found, data.corpus, name)


def _place(root: Path, data: str) -> str:
    """Return the path below the root if it exists or ``data`` looks like a path; else ``data`` itself, an id."""
    return str(root / data) if (root / data).exists() or not Path(data).exists() and ":" not in data else data


def _sample(items: Iterable[Item], count: int | None, seed: int) -> list[Item]:
    """Return ``count`` items at random; with the same seed a smaller sample is the beginning of a larger one."""
    shuffled = list(items)
    random.Random(seed).shuffle(shuffled)
    return shuffled[:count]


def digest(value: object) -> str:
    """Return a short fingerprint of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
