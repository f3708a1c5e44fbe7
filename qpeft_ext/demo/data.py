"""The demo's data: train, dev and test from the installed packages, or from a BEIR folder."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..formats import Corpus, beir


@dataclass
class Part:
    """Documents, queries and judgements of one split."""

    documents: Mapping[str, dict]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]


@dataclass
class DemoData:
    """Three splits; ``versions`` names the packages that were harvested."""

    name: str
    train: Part
    dev: Part
    test: Part
    versions: dict[str, str] = field(default_factory=dict)
    left_out: int = 0

    def describe(self) -> str:
        parts = [f"{len(getattr(self, part).queries)} {part}" for part in ("train", "dev", "test")]
        return f"{self.name}: {', '.join(parts)} queries; {len(self.test.documents):,} documents to search" + (
            f"; {self.left_out} queries left out as too long for the prompt" if self.left_out else ""
        )


def load_demo_data(
    folder: str | Path | None, queries: int, train_queries: int, seed: int, fits: Callable[[str], bool]
) -> DemoData:
    """Harvest, or read a BEIR folder with qrels for train and test (or dev). Queries that do not fit are left out."""
    data = _harvested(queries, train_queries, seed) if folder is None else _beir(folder, queries, train_queries, seed)
    for part in (data.train, data.dev, data.test):
        too_long = [query_id for query_id, text in part.queries.items() if not fits(text)]
        for query_id in too_long:
            del part.queries[query_id], part.qrels[query_id]
        data.left_out += len(too_long)
    return data


def _harvested(queries: int, train_queries: int, seed: int) -> DemoData:
    from .harvest import demo_collection

    collection = demo_collection(seed=seed, test_queries=queries)
    parts = (collection.train, collection.dev, collection.test)
    train, dev, test = (Part(part.documents, part.queries, part.qrels) for part in parts)
    versions = {name: version for part in parts for name, version in part.versions.items()}
    return DemoData(
        "docstrings and sources of the installed packages",
        _sample(train, train_queries, seed),
        _sample(dev, None, seed),
        _sample(test, None, seed),
        versions,
    )


def _beir(folder: str | Path, queries: int, train_queries: int, seed: int) -> DemoData:
    corpus, texts, splits = Corpus(folder), beir.read_queries(folder), beir.splits(folder)
    held_out = next((split for split in ("test", "dev") if split in splits), None)
    if "train" not in splits or held_out is None:
        raise ValueError(
            f"{folder}: the demo needs qrels/train.tsv and qrels/test.tsv (or dev.tsv), "
            f"got {', '.join(splits) or 'none'}"
        )

    def part(split: str) -> Part:
        qrels = beir.read_qrels(folder, split)
        return Part(corpus, {query_id: texts[query_id] for query_id in qrels if query_id in texts}, qrels)

    train = part("train")
    # dev queries for choosing come out of train, so that the held-out ones are looked at once
    dev = _sample(train, min(100, len(train.queries) // 5), seed + 1)
    rest = {query_id: text for query_id, text in train.queries.items() if query_id not in dev.queries}
    train = _sample(Part(corpus, rest, train.qrels), train_queries, seed)
    return DemoData(Path(folder).resolve().name, train, dev, _sample(part(held_out), queries, seed))


def _sample(part: Part, count: int | None, seed: int) -> Part:
    chosen = sorted(part.queries)
    if count is not None and count < len(chosen):
        chosen = sorted(random.Random(seed).sample(chosen, count))
    return Part(part.documents, {i: part.queries[i] for i in chosen}, {i: part.qrels[i] for i in chosen})
