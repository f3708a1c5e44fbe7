"""Which prefixes and which suffixes share a pass: sorted by true length, bounded by a budget of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .batch import PairBatch


def query_blocks(candidates: Sequence[int], max_pairs: int) -> Iterator[slice]:
    """Consecutive queries with at most ``max_pairs`` pairs together (one query at least).

    candidates: how many documents each query has.
    """
    start = pairs = 0
    for i, count in enumerate(candidates):
        if i > start and pairs + count > max_pairs:
            yield slice(start, i)
            start, pairs = i, 0
        pairs += count
    if len(candidates):
        yield slice(start, len(candidates))


def prefix_groups(batch: PairBatch, max_tokens: int) -> Iterator[list[int]]:
    """Documents that occur in the pairs, in groups of at most ``max_tokens`` padded tokens (at least one document)."""
    used = sorted({d for _, d in batch.pairs}, key=lambda d: len(batch.documents[d].ids))
    group: list[int] = []
    for d in used:  # ascending, so the newest one is the longest
        if group and (len(group) + 1) * len(batch.documents[d].ids) > max_tokens:
            yield group
            group = []
        group.append(d)
    if group:
        yield group


def suffix_groups(
    batch: PairBatch, documents: list[int], max_tokens: int, max_pairs: int | None, shared: bool
) -> Iterator[list[int]]:
    """Pairs of the documents, in groups of at most ``max_tokens`` tokens and ``max_pairs`` pairs.

    A pair counts with its query's tokens and an eighth of its prefix where that is only read from a cache, with
    the whole prompt otherwise.
    """
    wanted = set(documents)

    def tokens(i: int) -> int:
        q, d = batch.pairs[i]
        prefix = len(batch.documents[d].ids)
        return len(batch.queries[q]) + (prefix // 8 if shared else prefix)

    rows = sorted((i for i, (_, d) in enumerate(batch.pairs) if d in wanted), key=tokens)
    group: list[int] = []
    for i in rows:
        if group and ((len(group) + 1) * tokens(i) > max_tokens or (max_pairs and len(group) == max_pairs)):
            yield group
            group = []
        group.append(i)
    if group:
        yield group
