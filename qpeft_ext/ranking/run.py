"""Rerank a run: queries in blocks and in order, reading only the candidates' texts.

A block is ranked at once and, with several devices, by one of them. Blocks depend on nothing but the candidates, and
nothing of one block is reused in the next (except in a document cache, whose purpose that is), so that a run is the
same on any number of devices, and when it is resumed after a kill.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..engine.schedule import query_blocks
from ..formats.partial_run import PartialRun
from ..formats.trec import Run, check_id, find_line
from ..utils.files import AnyPath
from ..utils.progress import progress_bar
from ..utils.words import counted

if TYPE_CHECKING:
    from .reranker import Reranker

PAIRS_PER_BLOCK = 256  # several passes of the default token budget, and still some life in the progress bar

# (queries, their documents) -> for every query (place of the document, score), best first
Ranker = Callable[[Sequence[str], Sequence[Sequence[dict]]], list[list[tuple[int, float]]]]


@dataclass(frozen=True)
class Block:
    """Queries that are ranked together.

    Attributes:
        query_ids, queries: their ids and texts.
        doc_ids: the candidates of each.
        system: the name of the system that ranks them.
    """

    query_ids: list[str]
    queries: list[str]
    doc_ids: list[list[str]]
    system: str = ""


@dataclass(frozen=True)
class RankedBlock:
    """The rankings of a block, and counts of the work.

    Attributes:
        rankings: for every query (place of the document, score), best first.
        truncated: documents that were cut.
        cache_hits, cache_misses: prefixes that were in the cache, and that were not.
        long_sentences: sentences that were longer than a passage and were split between words.
    """

    rankings: list[list[tuple[int, float]]]
    truncated: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    long_sentences: int = 0


# blocks -> their rankings in the same order; reads only a few blocks ahead of what it has yielded
BlockRanker = Callable[[Iterator[Block]], Generator[RankedBlock]]


@dataclass
class RerankedRun:
    """A reranked run, and counts of the work.

    Attributes:
        run: the new ranking.
        num_pairs: (query, document) pairs scored.
        seconds: wall time, reading included.
        num_resumed: queries that an earlier process has ranked.
        truncated, cache_hits, cache_misses, long_sentences: sums over the blocks, see `RankedBlock`.
    """

    run: Run
    num_pairs: int
    seconds: float
    num_resumed: int = 0
    truncated: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    long_sentences: int = 0

    def __str__(self) -> str:
        ranked = len(self.run) - self.num_resumed
        pairs_per_second = self.num_pairs / self.seconds if self.seconds else 0.0
        text = (
            f"{counted(ranked, 'queries')}, {counted(self.num_pairs, 'pairs')} in {self.seconds:.1f} s "
            f"({pairs_per_second:.0f} pairs/s, {self.seconds / max(1, ranked):.3f} s per query)"
        )
        text += f", {self.cache_rate} cache hits" if self.cache_rate else ""
        notes = [
            (self.truncated, "documents cut to max_document_tokens", None),
            (self.long_sentences, "sentences longer than a passage, split", None),
            (self.num_resumed, "queries were there already", "query was there already"),
        ]
        return "; ".join([text, *(counted(n, many, one) for n, many, one in notes if n)])

    @property
    def cache_rate(self) -> str:
        """Share of prefixes that were in the cache; "" without one."""
        asked = self.cache_hits + self.cache_misses
        return f"{self.cache_hits / asked:.0%}" if asked else ""


def by_likelihood(reranker: Reranker, threshold: float | None = None) -> Ranker:
    """Return a function that ranks by the score of a `Reranker`; documents of a lower relevance are left out."""

    def rank(queries, documents):
        if (rows := getattr(reranker, "projected", None)) is not None:
            rows.clear()  # of another block: how rows are rounded depends on those that are projected with them
        rankings = reranker.rank_many(queries, documents, show_progress_bar=False, threshold=threshold)
        return [[(row["corpus_id"], row["score"]) for row in ranking] for ranking in rankings]

    return rank


def by_similarity(reranker: Reranker) -> Ranker:
    """Return a function that ranks by the clues only (`Reranker.similarity`); equal scores keep the given order."""

    def rank(queries, documents):
        return [
            sorted(enumerate(scores), key=lambda candidate: -candidate[1])
            for scores in reranker.similarity(queries, documents)
        ]

    return rank


def rerank_run(
    rank: Ranker,
    queries: Mapping[str, str],
    corpus: Mapping[str, dict],
    run: Run,
    *,
    name: str = "rerank",
    partial: PartialRun | None = None,
    show_progress_bar: bool | None = None,
) -> RerankedRun:
    """Rerank the candidates of every query of ``run`` in this process.

    Args:
        rank: `by_likelihood` or `by_similarity` of a `Reranker`.
        queries: query_id → text.
        corpus: doc_id → document.
        run: the candidates; `check_candidates` says whether they are known.
        name: stands before the progress bar.
        partial: gets each of its blocks, which should be `run_blocks`, as soon as it is ranked; those that it has
            already are not ranked again.
        show_progress_bar: None shows it on a terminal only.
    Returns: the new run, with the queries in the order of ``run``.
    """

    def rank_blocks(blocks: Iterator[Block]) -> Generator[RankedBlock]:
        for block in blocks:
            yield RankedBlock(rank(block.queries, read_documents(corpus, block)))

    return rerank_blocks(rank_blocks, queries, run, name=name, partial=partial, show_progress_bar=show_progress_bar)


def rerank_blocks(
    rank: BlockRanker,
    queries: Mapping[str, str],
    run: Run,
    *,
    name: str = "rerank",
    partial: PartialRun | None = None,
    show_progress_bar: bool | None = None,
) -> RerankedRun:
    """Rerank a run by any `BlockRanker`: this process, worker processes, or Ray.

    Args:
        rank: ranks blocks.
        queries, run, partial, show_progress_bar: as for `rerank_run`.
        name: the system that ``rank`` is asked for; stands before the progress bar too.
    Returns: the new run, with the queries in the order of ``run``.
    """
    every = partial.blocks if partial else run_blocks(run)
    blocks = [_block(queries, run, query_ids, name) for query_ids in every[partial.num_pieces if partial else 0 :]]
    total = sum(map(len, run.values()))
    num_pairs = sum(len(doc_ids) for block in blocks for doc_ids in block.doc_ids)
    result = RerankedRun({}, num_pairs, 0.0, partial.num_resumed if partial else 0)
    fresh: Run = {}
    start = time.perf_counter()
    with (
        contextlib.closing(rank(iter(blocks))) as ranked_blocks,
        progress_bar(
            total=total, initial=total - num_pairs, desc=name, unit="pair", show=show_progress_bar
        ) as progress,
    ):
        for block, ranked in zip(blocks, ranked_blocks, strict=True):
            rankings = {
                query_id: [(doc_ids[place], score) for place, score in places]
                for query_id, doc_ids, places in zip(block.query_ids, block.doc_ids, ranked.rankings, strict=True)
            }
            if partial:
                partial.add(rankings)
            fresh |= rankings
            result.truncated += ranked.truncated
            result.cache_hits += ranked.cache_hits
            result.cache_misses += ranked.cache_misses
            result.long_sentences += ranked.long_sentences
            if result.cache_rate:
                progress.set_postfix_str(f"{result.cache_rate} cache hits", refresh=False)
            progress.update(sum(map(len, block.doc_ids)))
    result.seconds = time.perf_counter() - start
    rankings = partial.rankings if partial else fresh
    result.run = {query_id: rankings[query_id] for query_id in run}
    return result


def run_blocks(run: Run) -> list[list[str]]:
    """Return the ids of the queries of each block."""
    every_id = list(run)
    return [every_id[place] for place in query_blocks([len(ranking) for ranking in run.values()], PAIRS_PER_BLOCK)]


def _block(queries: Mapping[str, str], run: Run, query_ids: Sequence[str], system: str) -> Block:
    doc_ids = [[doc_id for doc_id, _ in run[query_id]] for query_id in query_ids]
    return Block(list(query_ids), [queries[query_id] for query_id in query_ids], doc_ids, system)


def read_documents(corpus: Mapping[str, dict], block: Block) -> list[list[dict]]:
    """Read the candidates of each query of a block."""
    return [[corpus[doc_id] for doc_id in doc_ids] for doc_ids in block.doc_ids]


def check_candidates(run: Run, queries: Mapping[str, str], corpus: Mapping[str, dict], path: AnyPath | None) -> None:
    """Check that every query and candidate is known, and that its id fits into a run.

    Args:
        run: the candidates.
        queries, corpus: what is known.
        path: the file that the run is from, for messages.
    Raises: ValueError naming the id, and the line if ``path`` is given.
    """
    for query_id, candidates in run.items():
        for name, value in (("query_id", query_id), *(("doc_id", doc_id) for doc_id, _ in candidates)):
            try:
                check_id(name, value)
            except ValueError as error:
                place = _place(path, query_id, value if name == "doc_id" else None)
                raise ValueError(f"{place}{error}; rename it in the data") from None
        if query_id not in queries:
            raise ValueError(
                f"{_place(path, query_id)}query {query_id!r} is not in the queries; the run belongs to another data set"
            )
        for doc_id, _ in candidates:
            if doc_id not in corpus:
                raise ValueError(
                    f"{_place(path, query_id, doc_id)}document {doc_id!r} of query {query_id!r} is not in "
                    f"the corpus; the run belongs to another corpus"
                )


def _place(path: AnyPath | None, query_id: str, doc_id: str | None = None) -> str:
    if path is None:
        return ""
    line = find_line(path, query_id, doc_id)
    return f"{path}: " if line is None else f"{path}, line {line}: "
