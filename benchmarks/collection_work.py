"""Queries of a collection with their best candidates by BM25: work of real lengths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qpeft_ext.ranking.first_stage import BM25


@dataclass
class Work:
    """Queries, and for each of them the same number of candidates, of which some are relevant."""

    queries: list[str]
    documents: list[list[dict]]
    relevances: np.ndarray  # [queries, candidates]

    def pairs(self) -> list[tuple[str, dict]]:
        return [
            (query, document) for query, some in zip(self.queries, self.documents, strict=True) for document in some
        ]


def make_work(data: str | None, split: str | None, queries: int, candidates: int, seed: int = 0) -> Work:
    """Draw queries from a collection, or from the docstrings of the demo, and search their candidates."""
    from qpeft_ext import formats
    from qpeft_ext.demo.data import load_demo_data

    if data is None:
        test = load_demo_data(None, max(queries, candidates), 1, seed, lambda text: True).test
        corpus, asked, qrels = test.documents, test.queries, test.qrels
    else:
        collection = formats.open_collection(data)
        corpus, asked, qrels = collection.corpus, collection.queries(split), collection.qrels(split)
    bm25 = BM25(corpus, show_progress_bar=False)
    work = Work([], [], np.zeros((0, candidates)))
    for query_id in np.random.default_rng(seed).permutation(sorted(qrels)):
        found = [doc_id for doc_id, _ in bm25.search(asked[query_id], candidates)]
        if len(found) < candidates:
            continue
        work.queries.append(asked[query_id])
        work.documents.append([corpus[doc_id] for doc_id in found])
        work.relevances = np.vstack([work.relevances, [qrels[query_id].get(doc_id, 0) for doc_id in found]])
        if len(work.queries) == queries:
            break
    return work
