"""Which prefixes and which suffixes share a pass: sorted by true length, bounded by a budget of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from ..ops.hardware import multiplies_bfloat16_by_tiles
from ..prompts.pairs import PairBatch

READ_TOKENS_PER_TOKEN = 8  # a prefix token that is only read from a cache takes about an eighth of one that is computed


def default_tokens(device: torch.device) -> int:
    """Token budget of a pass. On a CPU more brings nothing (25 M Llama: 2048, 4096 and 8192 alike) and takes memory."""
    return 8192 if device.type == "cuda" else 2048


def prefix_tokens(max_tokens: int, device: torch.device, prefilled: bool) -> int:
    """Tokens of the documents whose pairs are scored together, without gradient, of a budget of ``max_tokens``.

    prefilled: all of them are in a cache's memory and only read. Otherwise they are computed and held; on a CPU half of
    them at once is as fast (25 M Llama, 160 pairs: 8.5 s and 8.6 s), and 77 MB of memory less at the peak.
    """
    if prefilled:
        return max_tokens * READ_TOKENS_PER_TOKEN
    return max_tokens if device.type == "cuda" else max(1, max_tokens // 2)


def tokens_worth_a_pass(device: torch.device, dtype: torch.dtype) -> int:
    """How much padding a pass of its own is worth: its fixed cost, in tokens. ``dtype``: of the LM."""
    if device.type == "cuda":
        return 1024
    return 512 if dtype == torch.bfloat16 and multiplies_bfloat16_by_tiles() else 64


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


def document_jobs(batch: PairBatch, max_pairs: int) -> Iterator[list[int]]:
    """Pairs in lists of about ``max_pairs``: all pairs of a document together, the longest documents first.

    The longest first, so that what does not fit in memory is known at once.
    """
    of_document: dict[int, list[int]] = {}
    for i, (_, d) in enumerate(batch.pairs):
        of_document.setdefault(d, []).append(i)
    job: list[int] = []
    for d in sorted(of_document, key=lambda d: -len(batch.documents[d].ids)):
        if job and len(job) + len(of_document[d]) > max_pairs:
            yield job
            job = []
        job += of_document[d]
    if job:
        yield job


def suffix_jobs(batch: PairBatch, max_pairs: int) -> Iterator[list[int]]:
    """Pairs in lists of at most ``max_pairs``, queries of one length together: for prefixes that are all in a cache."""

    def lengths(i: int) -> tuple[int, int]:
        q, d = batch.pairs[i]
        return -len(batch.queries[q]), -len(batch.documents[d].ids)

    rows = sorted(range(len(batch)), key=lengths)
    yield from (rows[start : start + max_pairs] for start in range(0, len(rows), max_pairs))


def prefix_groups(batch: PairBatch, max_tokens: int, pass_tokens: int) -> Iterator[list[int]]:
    """Documents that occur in the pairs, in groups of at most ``max_tokens`` padded tokens (at least one document)."""

    def length(d: int) -> int:
        return len(batch.documents[d].ids)

    yield from _groups({d for _, d in batch.pairs}, length, length, max_tokens, None, pass_tokens)


def suffix_groups(
    batch: PairBatch,
    documents: list[int],
    max_tokens: int,
    max_pairs: int | None,
    pass_tokens: int,
    shared: bool,
    clue_per_token: bool,
    step: int = 1,
) -> Iterator[list[int]]:
    """Pairs of the documents, in groups of at most ``max_tokens`` tokens and ``max_pairs`` pairs, multiples of ``step``
    where they can be.

    A pair counts with its query's tokens and an eighth of the group's longest prefix where that is only read from a
    cache, with the whole prompt otherwise. ``clue_per_token``: each query token brings a clue.
    """
    wanted, factor = set(documents), 2 if clue_per_token else 1
    read = max(len(batch.documents[d].ids) for d in documents) // READ_TOKENS_PER_TOKEN if shared else 0

    def length(i: int) -> int:
        q, d = batch.pairs[i]
        return factor * len(batch.queries[q]) + (0 if shared else len(batch.documents[d].ids))

    rows = [i for i, (_, d) in enumerate(batch.pairs) if d in wanted]
    yield from _groups(rows, length, lambda i: length(i) + read, max_tokens, max_pairs, pass_tokens, step)


def generation_groups(lengths: Sequence[int], new_tokens: int, max_tokens: int) -> Iterator[list[int]]:
    """Prompts that are gone on with for ``new_tokens``, in groups of at most ``max_tokens`` (at least one prompt).

    A pass of its own costs as many steps as there are new tokens, so padding never ends a group.
    """
    yield from _groups(
        range(len(lengths)), lengths.__getitem__, lambda i: lengths[i] + new_tokens, max_tokens, None, max_tokens
    )


def _groups(
    items,
    length: Callable[[int], int],
    tokens: Callable[[int], int],
    max_tokens: int,
    max_items: int | None,
    pass_tokens: int,
    step: int = 1,
) -> Iterator[list[int]]:
    """Items from the longest to the shortest; a group ends before it pads more than ``pass_tokens`` tokens.

    The last items of a group wait for the next one if it then has a multiple of ``step``.
    """
    group: list[int] = []
    padding = 0
    for i in sorted(items, key=lambda i: -length(i)):
        padding += length(group[0]) - length(i) if group else 0
        full = group and ((len(group) + 1) * tokens(group[0]) > max_tokens or len(group) == max_items)
        if full or padding > pass_tokens:
            whole = len(group) - len(group) % step or len(group)
            yield group[:whole]
            group = group[whole:]
            padding = sum(length(group[0]) - length(j) for j in [*group, i]) if group else 0
            if padding > pass_tokens:
                yield group
                group, padding = [], 0
        group.append(i)
    if group:
        yield group
