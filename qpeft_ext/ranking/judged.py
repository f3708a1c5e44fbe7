"""Judged queries with the best documents of a first stage, to calibrate on."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import formats
from ..formats.trec import Run
from ..prompts.prompt import Document
from .first_stage import asked_queries, first_stage


@dataclass(frozen=True)
class Judged:
    """Queries, their candidates, and which of them are relevant.

    Attributes:
        name: of the data, for people.
        queries: their texts.
        documents: the candidates of each.
        relevant: for each candidate whether it is relevant.
    """

    name: str
    queries: list[str]
    documents: list[list[Document]]
    relevant: list[list[bool]]

    def __post_init__(self) -> None:
        """Raises: ValueError if a calibration would fail: each half of the queries needs documents of both kinds."""
        for half in (self.relevant[::2], self.relevant[1::2]):
            values = [value for row in half for value in row]
            if not any(values) or all(values):
                raise ValueError(
                    f"{self.name}: to calibrate, each half of the {len(self.queries)} queries needs relevant and other "
                    "documents among its candidates; give more queries, or a run that finds relevant ones"
                )

    @classmethod
    def of_examples(cls, name: str, examples: Sequence[Mapping[str, Any]]) -> Judged:
        """Take the positives and negatives of training examples.

        Args:
            name: of the data.
            examples: each with "query", "positives" and "negatives".
        """
        documents = [[*example["positives"], *example.get("negatives", ())] for example in examples]
        counts = [len(example["positives"]) for example in examples]
        relevant = [[place < count for place in range(len(row))] for row, count in zip(documents, counts, strict=True)]
        return cls(name, [example["query"] for example in examples], documents, relevant)

    @classmethod
    def of(
        cls,
        name: str,
        queries: Mapping[str, str],
        candidates: Run,
        qrels: Mapping[str, Mapping[str, int]],
        corpus: Mapping[str, dict],
    ) -> Judged:
        """Read the candidates of queries; a query without one is left out.

        Args:
            name: of the data.
            queries: query_id → text.
            candidates: query_id → (doc_id, score).
            qrels: query_id → doc_id → grade; a document without one is not relevant.
            corpus: doc_id → document.
        """
        kept = [query_id for query_id in queries if candidates.get(query_id)]
        return cls(
            name,
            [queries[query_id] for query_id in kept],
            [[corpus[doc_id] for doc_id, _ in candidates[query_id]] for query_id in kept],
            [[qrels[query_id].get(doc_id, 0) > 0 for doc_id, _ in candidates[query_id]] for query_id in kept],
        )


def draw_judged(data: str, split: str | None, count: int, top_k: int, run: Path | None, seed: int) -> Judged:
    """Draw judged queries of a data set, with their candidates.

    Args:
        data: as for `formats.open_collection`.
        split: whose queries; None for "dev" or else "train", or the only one.
        count: how many at most.
        top_k: candidates of each.
        run: the run of the first stage, or None.
        seed: of the draw.
    Raises: ValueError for a data set without judgements, or that has no such split.
    """
    collection = formats.open_collection(data)
    if split is None:
        split = next((name for name in ("dev", "train") if name in collection.splits), None)
    asked = asked_queries(collection, split)
    drawn = sorted(random.Random(seed).sample(sorted(asked), min(count, len(asked))))
    queries = {query_id: asked[query_id] for query_id in drawn}
    candidates, before = first_stage(collection, split, queries, run, top_k)
    candidates = {query_id: candidates[query_id] for query_id in drawn if query_id in candidates}
    qrels = collection.judge(split, [candidates])
    if not qrels:
        raise ValueError(f"{data} has no judgements; its splits: {', '.join(collection.splits) or 'none'}")
    judged = {query_id: qrels.get(query_id, {}) for query_id in drawn}
    name = f"{Path(data).name}{f' {split}' if split else ''} ({before}'s best {top_k})"
    return Judged.of(name, queries, candidates, judged, collection.corpus)
