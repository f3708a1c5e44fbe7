"""The experiments' data: functions and docstrings of packages that the base LM has not read, split by package."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qpeft_ext.demo import harvest
from qpeft_ext.first_stage import bm25_run
from qpeft_ext.formats import training_examples

# Installed beside torch and the tests, and in none of the demo's lists: neither the LM nor the demo knows them.
UNREAD_PACKAGES = (
    "_pytest", "build", "cpuinfo", "functorch", "h11", "httpcore2", "httpx2", "hypothesis", "idna", "pluggy",
    "pybind11", "pydantic", "pydantic_core", "pyproject_hooks", "pytest_benchmark", "sortedcontainers", "torchgen",
    "truststore", "typing_inspection", "yaml",
)  # fmt: skip
DEPTH = {"train": 40, "stop": 20, "dev": 20, "test": 20}  # candidates of BM25 for each query
STOP_QUERIES, DEV_QUERIES = 150, 1200  # of the dev packages: to choose a checkpoint by, and to decide by; disjoint
TEST_QUERIES = 1000


@dataclass
class Split:
    """``queries`` id → text, ``documents`` id → document, ``run`` id → BM25's candidates [(doc_id, score)].

    The one relevant document of a query has the query's id.
    """

    queries: dict[str, str]
    documents: dict[str, dict]
    run: dict[str, list[tuple[str, float]]]

    def found(self) -> list[str]:
        """Queries whose document is a candidate: the others count 0 for every reranker and need not be scored."""
        return [q for q, ranking in self.run.items() if any(d == q for d, _ in ranking)]

    def examples(self, num_negatives: int, seed: int = 0, depth: int = 40) -> list[dict]:
        qrels = {q: {q: 1} for q in self.queries}
        return training_examples(
            self.queries, qrels, self.run, self.documents, num_negatives=num_negatives, depth=depth, seed=seed
        )[0]


def load_split(name: str, folder: Path, fits, packages=None) -> Split:
    """A split of the collection, harvested once and kept in ``folder``; queries that do not fit the prompt are left
    out. ``packages``: what to train on instead of `UNREAD_PACKAGES`."""
    if packages is not None:
        name = f"{name}-{'-'.join(packages)}"
    path = folder / f"{name}.json"
    if not path.exists():
        part = name.partition("-")[0]
        split = _harvest(part, packages or UNREAD_PACKAGES, fits)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(vars(split)))
    return Split(**json.loads(path.read_text()))


def _harvest(name: str, train_packages, fits) -> Split:
    of = {"train": train_packages, "test": harvest.TEST_PACKAGES}
    collection = harvest.harvest(of.get(name, harvest.DEV_PACKAGES), show_progress_bar=False)
    queries = {q: text for q, text in sorted(collection.queries.items()) if fits(text)}
    if name in ("stop", "dev"):
        drawn = random.Random(0).sample(sorted(queries), STOP_QUERIES + DEV_QUERIES)
        chosen = drawn[:STOP_QUERIES] if name == "stop" else drawn[STOP_QUERIES:]
        queries = {q: queries[q] for q in sorted(chosen)}
    if name == "test":
        queries = {q: queries[q] for q in sorted(random.Random(0).sample(sorted(queries), TEST_QUERIES))}
    run = bm25_run(collection.documents, queries, DEPTH[name], show_progress_bar=False)
    return Split(queries, collection.documents, run)


def ndcg(scores: list[np.ndarray], places: list[int]) -> np.ndarray:
    """nDCG@10 of each query whose only relevant document is at ``places``; ties count against it."""
    ranks = np.array([(s >= s[i]).sum() for s, i in zip(scores, places, strict=True)])
    return np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0)
