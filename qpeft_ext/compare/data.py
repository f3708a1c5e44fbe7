"""What all methods of a comparison share: test queries, candidates, training examples, dev queries."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Collection as Ids
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from .. import formats
from ..formats.trec import Qrels, Run
from ..prompts.prompt import Prompt
from ..ranking.first_stage import asked_queries, first_stage
from ..ranking.run import check_candidates
from .plan import Collection, Part, Training

SAMPLE_SEED = 0  # of test and dev queries: the same for all seeds of a plan


@dataclass
class Ranked:
    """Queries with candidates.  left_out: queries that are too long for the prompt."""

    queries: dict[str, str]
    qrels: Qrels
    candidates: Run
    corpus: Mapping[str, dict]
    first_stage: str
    left_out: int = 0

    @cached_property
    def digest(self) -> str:
        """A short fingerprint of all that a method's ranking, and its evaluation, depends on.

        The texts themselves count, not the file: a copy of the data is the same data.
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
        root: folder that paths of the plan are below.  prompt: says which queries fit.
    Attributes: test: `Ranked`.
    Raises: ValueError or OSError, one line, for data that cannot be read or do not belong together.
    """

    def __init__(self, collection: Collection, root: Path, prompt: Prompt) -> None:
        self.collection, self._root, self._prompt = collection, root, prompt
        self._examples = cache(self._read_examples)
        c = collection
        self.test = self._ranked(Part(c.data, c.split, c.run, c.queries), c.candidates, SAMPLE_SEED, set())

    @cached_property
    def dev(self) -> Ranked:
        """Queries other than the test queries."""
        return self._ranked(self.collection.dev, self.collection.candidates, SAMPLE_SEED, self._taken(dev=False))

    def examples(self, which: str, training: Training, seed: int) -> list[dict]:
        """Training examples of a seed: the queries, their negatives and their order depend on it.

        Never a test or dev query. The examples of fewer queries are among those of more.
        """
        return self._examples(which, training.queries, training.negatives, training.depth, seed)

    def _read_examples(self, which: str, count: int, negatives: int, depth: int, seed: int) -> list[dict]:
        part: Part = getattr(self.collection, which)
        count = min(count, part.queries or count)
        taken = self._taken(dev=True)
        if part.examples:
            path = self._root / part.examples
            found = [
                example
                for example in formats.read_examples(path)
                if self._prompt.fits(example["query"]) and example["query"] not in taken
            ]
            chosen = sorted(_sample(range(len(found)), count, seed))
            examples = [found[i] for i in chosen]
            place = str(path)
        else:
            data, queries, qrels, _ = self._sampled(part, count, seed, taken, with_relevant=True)
            most = depth + max((len(judged) for judged in qrels.values()), default=0)
            run = self._root / part.run if part.run else None
            candidates, _ = first_stage(data, part.split, queries, run, most)
            examples, _ = formats.training_examples(
                queries, qrels, candidates, data.corpus, num_negatives=negatives, depth=depth, seed=seed
            )
            place = f"{data.place}, split {part.split}"
        if len(examples) < count:
            raise ValueError(
                f"{place}: {count} training queries were asked for, there are {len(examples)} that are "
                f"judged, fit the prompt and are no test or dev queries; {which}.queries of the "
                "collection can say how many it has"
            )
        return examples

    def _taken(self, dev: bool) -> set[str]:
        """The texts of the test queries, and of the dev queries too: whatever their ids, they are not trained on."""
        return {*self.test.queries.values(), *(self.dev.queries.values() if dev and self.collection.dev else ())}

    def _sampled(self, part: Part, count: int | None, seed: int, taken: set[str], with_relevant=False):
        """Collection, queries and qrels of a part; the number of queries that are too long.

        with_relevant: only queries with a relevant document.
        """
        data = formats.open_collection(_place(self._root, part.data))
        split = data.choose_split(part.split) if data.splits else None
        judged = data.qrels(split)
        asked = {
            q: text
            for q, text in asked_queries(data, split).items()
            if q in judged and text not in taken and (not with_relevant or max(judged[q].values()) > 0)
        }
        fitting = {q: text for q, text in asked.items() if self._prompt.fits(text)}
        chosen = sorted(_sample(sorted(fitting), count, seed))
        queries = {q: fitting[q] for q in chosen}
        return data, queries, {q: judged[q] for q in queries}, len(asked) - len(fitting)

    def _ranked(self, part: Part, candidates: int, seed: int, taken: set[str]) -> Ranked:
        data, queries, qrels, left_out = self._sampled(part, part.queries, seed, taken)
        if not queries:
            raise ValueError(f"{data.place}, split {part.split}: no judged query is left")
        run = self._root / part.run if part.run else None
        found, name = first_stage(data, part.split, queries, run, candidates)
        found = {q: found[q] for q in queries if found.get(q)}
        check_candidates(found, queries, data.corpus, run)
        return Ranked(queries, qrels, found, data.corpus, name, left_out)


def _place(root: Path, data: str) -> str:
    """A path below the root, where there is one; else the name as it is (an id)."""
    return str(root / data) if (root / data).exists() or not Path(data).exists() and ":" not in data else data


def _sample(items: Ids, count: int | None, seed: int) -> list:
    """``count`` of the items, in an order of chance in which a smaller sample is the beginning of a larger one."""
    items = list(items)
    random.Random(seed).shuffle(items)
    return items[:count]


def digest(value: object) -> str:
    """A short fingerprint of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
