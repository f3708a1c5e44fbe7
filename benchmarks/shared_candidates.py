"""Queries whose candidates overlap, as texts of random words for the tokenizer of random_llama.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from random_llama import Shape

LONGEST_DOCUMENT = 320  # tokens


@dataclass(frozen=True)
class Setting:
    """The LM, and how much is reranked."""

    shape: Shape
    queries: int = 50
    candidates: int = 100
    parts: int = 5
    suffix: str = ""  # of the works' names; the fixed ones belong to the 25 M Llama


SETTINGS = {
    "25m": Setting(Shape()),
    "small": Setting(Shape(layers=4, width=256, inner=768, heads=4, vocabulary=4000), suffix="/small"),
    "tiny": Setting(
        Shape(layers=2, width=64, inner=96, heads=4, vocabulary=300, document=30, query=5),
        queries=4,
        candidates=6,
        parts=2,
        suffix="/tiny",
    ),
}


@dataclass
class Pairs:
    """Queries and documents as texts, and pairs of their indices in the order of the queries."""

    queries: list[str]
    documents: list[str]
    pairs: list[tuple[int, int]]

    def texts(self) -> list[tuple[str, str]]:
        return [(self.queries[q], self.documents[d]) for q, d in self.pairs]

    def part(self, r: int, parts: int, by_query: bool = False) -> Pairs:
        return replace(self, pairs=[(q, d) for q, d in self.pairs if (q if by_query else d) % parts == r])

    def few(self, count: int) -> Pairs:
        """Return about ``count`` of the pairs, evenly spread."""
        return replace(self, pairs=self.pairs[:: max(1, len(self.pairs) // count)])


def make_pairs(setting: Setting, sharing: float, seed: int = 0) -> Pairs:
    """Make random texts: words follow Zipf's law, a few documents are candidates of many queries, most of one."""
    shape, random = setting.shape, np.random.default_rng(seed)
    frequencies = 1 / np.arange(1, shape.vocabulary - 9) ** 1.05
    frequencies /= frequencies.sum()
    names = random.permutation(np.arange(10, shape.vocabulary))

    def text(length: int) -> str:
        return " ".join(f"w{i}" for i in names[random.choice(len(names), length, p=frequencies)])

    pairs = _shared_candidates(setting, sharing, random)
    spread = 0.4
    sigma = math.sqrt(math.log(1 + spread**2))
    count, longest = 1 + max(d for _, d in pairs), LONGEST_DOCUMENT * shape.document // 200
    lengths = np.exp(random.normal(math.log(shape.document) - sigma**2 / 2, sigma, count)).round().clip(8, longest)
    documents = [text(int(n)) for n in lengths]
    queries = [text(n) for n in random.integers(shape.query - 4, shape.query + 5, setting.queries)]
    return Pairs(queries, documents, pairs)


def _shared_candidates(setting: Setting, sharing: float, random: np.random.Generator) -> list[tuple[int, int]]:
    """Choose the candidates of every query from a pool, which grows until enough distinct documents are chosen."""
    total = setting.queries * setting.candidates
    if sharing <= 1:
        return [(i // setting.candidates, i) for i in range(total)]
    pool, used = round(total / sharing), set()
    while len(used) * sharing < total:
        popularity = random.pareto(3, pool) + 0.5  # a few documents are candidates of many queries
        popularity /= popularity.sum()
        pairs = [
            (q, int(d))
            for q in range(setting.queries)
            for d in random.choice(pool, setting.candidates, replace=False, p=popularity)
        ]
        used = {d for _, d in pairs}
        pool = round(pool * 1.05)
    place = {d: i for i, d in enumerate(sorted(used))}
    return [(q, place[d]) for q, d in pairs]
