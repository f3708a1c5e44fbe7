"""The demo's data: train, dev and test splits, of the installed packages or of a BEIR folder."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..formats import Corpus, beir
from ..utils.words import counted


@dataclass
class Split:
    """Documents, queries and judgements of one split."""

    documents: Mapping[str, dict]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]


@dataclass
class DemoData:
    """Three splits.

    Attributes:
        name: what they are made of.
        train, dev, test: the splits.
        versions: package -> version, of the packages that were harvested.
        left_out: how many queries are too long for the prompt.
    """

    name: str
    train: Split
    dev: Split
    test: Split
    versions: dict[str, str] = field(default_factory=dict)
    left_out: int = 0

    def split(self, name: str) -> Split:
        """Return "train", "dev" or "test"."""
        return {"train": self.train, "dev": self.dev, "test": self.test}[name]

    def describe(self) -> str:
        """Return the sizes of the splits in a line."""
        sizes = [f"{len(self.split(name).queries)} {name}" for name in ("train", "dev", "test")]
        documents = counted(len(self.test.documents), "documents to search", spec=",")
        left_out = counted(self.left_out, "queries left out as too long for the prompt")
        return f"{self.name}: {', '.join(sizes)} queries; {documents}" + (f"; {left_out}" if self.left_out else "")


def load_demo_data(
    folder: str | Path | None,
    queries: int,
    train_queries: int,
    seed: int,
    fits: Callable[[str], bool],
    dev_queries: int | None = None,
) -> DemoData:
    """Harvest the installed packages, or read a BEIR folder with qrels for train and for test or dev.

    Args:
        folder: the BEIR folder; None: harvest.
        queries: how many test queries are sampled.
        train_queries: how many training queries are sampled.
        seed: seed of the samples.
        fits: whether a query fits the prompt; others are left out.
        dev_queries: how many dev queries are sampled; None: all of the installed packages, 100 of a BEIR folder.

    Raises: ValueError or OSError for a folder without such qrels.
    """
    sizes = queries, train_queries, dev_queries, seed
    data = _harvested(*sizes) if folder is None else _beir(folder, *sizes)
    for split in (data.train, data.dev, data.test):
        too_long = [query_id for query_id, text in split.queries.items() if not fits(text)]
        for query_id in too_long:
            del split.queries[query_id], split.qrels[query_id]
        data.left_out += len(too_long)
    return data


def _harvested(queries: int, train_queries: int, dev_queries: int | None, seed: int) -> DemoData:
    from .harvest import demo_collection

    collection = demo_collection(seed=seed, test_queries=queries)
    harvests = (collection.train, collection.dev, collection.test)
    train, dev, test = (Split(harvest.documents, harvest.queries, harvest.qrels) for harvest in harvests)
    versions = {name: version for harvest in harvests for name, version in harvest.versions.items()}
    return DemoData(
        "docstrings and sources of the installed packages",
        _sample(train, train_queries, seed),
        _sample(dev, dev_queries, seed),
        _sample(test, None, seed),
        versions,
    )


def _beir(folder: str | Path, queries: int, train_queries: int, dev_queries: int | None, seed: int) -> DemoData:
    corpus, texts, splits = Corpus(folder), beir.read_queries(folder), beir.splits(folder)
    held_out = next((name for name in ("test", "dev") if name in splits), None)
    if "train" not in splits or held_out is None:
        raise ValueError(
            f"{folder}: the demo needs qrels/train.tsv and qrels/test.tsv (or dev.tsv), "
            f"got {', '.join(splits) or 'none'}"
        )

    def read(name: str) -> Split:
        qrels = beir.read_qrels(folder, name)
        return Split(corpus, {query_id: texts[query_id] for query_id in qrels if query_id in texts}, qrels)

    train = read("train")
    # dev queries, which are for choosing, are taken out of train, so that test queries are looked at once
    dev = _sample(train, min(dev_queries or 100, len(train.queries) // 5), seed + 1)
    rest = {query_id: text for query_id, text in train.queries.items() if query_id not in dev.queries}
    train = _sample(Split(corpus, rest, train.qrels), train_queries, seed)
    return DemoData(Path(folder).resolve().name, train, dev, _sample(read(held_out), queries, seed))


def _sample(split: Split, count: int | None, seed: int) -> Split:
    chosen = sorted(split.queries)
    if count is not None and count < len(chosen):
        chosen = sorted(random.Random(seed).sample(chosen, count))
    return Split(split.documents, {i: split.queries[i] for i in chosen}, {i: split.qrels[i] for i in chosen})
