"""Rerank a run: queries in blocks and in order, reading only the candidates' texts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tqdm.auto import tqdm

from .formats.io import AnyPath
from .formats.trec import Run, RunWriter, find_line
from .schedule import query_blocks

PAIRS_PER_BLOCK = 256  # several passes of the default token budget, and still some life in the progress bar

# (queries, their documents) -> for every query (place of the document, score), best first
Ranker = Callable[[Sequence[str], Sequence[Sequence[dict]]], list[list[tuple[int, float]]]]


@dataclass
class RerankedRun:
    """``run``: the new ranking.  num_pairs: (query, document) pairs scored.  seconds: wall time, reading included."""

    run: Run
    num_pairs: int
    seconds: float

    def __str__(self) -> str:
        pairs_per_second = self.num_pairs / self.seconds if self.seconds else 0.0
        return (f"{len(self.run)} queries, {self.num_pairs} pairs in {self.seconds:.1f} s "
                f"({pairs_per_second:.0f} pairs/s, {self.seconds / max(1, len(self.run)):.3f} s per query)")


def by_likelihood(reranker) -> Ranker:
    """Rank by the reranker's score."""
    def rank(queries, documents):
        rankings = reranker.rank_many(queries, documents, show_progress_bar=False)
        return [[(row["corpus_id"], row["score"]) for row in ranking] for ranking in rankings]

    return rank


def by_similarity(reranker) -> Ranker:
    """Rank by the sum of `similarity_topk` scores; no LM runs. Equal scores stay in the order of the candidates."""
    def rank(queries, documents):
        return [sorted(enumerate(scores), key=lambda candidate: -candidate[1])
                for scores in reranker.similarity(queries, documents)]

    return rank


def rerank_run(
    rank: Ranker, queries: Mapping[str, str], corpus: Mapping[str, dict], run: Run, *,
    name: str = "rerank", writer: RunWriter | None = None, show_progress_bar: bool | None = None,
) -> RerankedRun:
    """Rerank the candidates of every query of ``run``.

    Args:
        rank: `by_likelihood` or `by_similarity` of a `Reranker`.
        run: the candidates; `check_candidates` says whether they are known.
        writer: gets each query as soon as it is ranked.
        show_progress_bar: None: only on a terminal.
    """
    reranked: Run = {}
    every_id = list(run)
    num_pairs = sum(map(len, run.values()))
    start = time.perf_counter()
    hidden = None if show_progress_bar is None else not show_progress_bar
    with tqdm(total=num_pairs, desc=name, unit="pair", disable=hidden) as progress:
        for block in query_blocks([len(ranking) for ranking in run.values()], PAIRS_PER_BLOCK):
            query_ids = every_id[block]
            documents = [[corpus[doc_id] for doc_id, _ in run[query_id]] for query_id in query_ids]
            rankings = rank([queries[query_id] for query_id in query_ids], documents)
            for query_id, ranking in zip(query_ids, rankings, strict=True):
                candidates = run[query_id]
                reranked[query_id] = [(candidates[place][0], score) for place, score in ranking]
                if writer:
                    writer.add(query_id, reranked[query_id])
                progress.update(len(candidates))
    return RerankedRun(reranked, num_pairs, time.perf_counter() - start)


def check_candidates(run: Run, queries: Mapping[str, str], corpus: Mapping[str, dict], path: AnyPath | None) -> None:
    """Every query and candidate must be known. Raises: ValueError naming the id, and the line if ``path`` is given."""
    for query_id, candidates in run.items():
        if query_id not in queries:
            raise ValueError(f"{_place(path, query_id)}query {query_id!r} is not in the queries; "
                             f"the run belongs to another data set")
        for doc_id, _ in candidates:
            if doc_id not in corpus:
                raise ValueError(f"{_place(path, query_id, doc_id)}document {doc_id!r} of query {query_id!r} is not in "
                                 f"the corpus; the run belongs to another corpus")


def _place(path: AnyPath | None, query_id: str, doc_id: str | None = None) -> str:
    return "" if path is None else f"{path}, line {find_line(path, query_id, doc_id)}: "
