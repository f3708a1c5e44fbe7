"""The schedule: which documents and which pairs share a pass. Decided from lengths and limits alone; it runs nothing.

Passes are bounded by a budget of tokens; what shares one is decided in `groups`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ..ops.hardware import multiplies_bfloat16_by_tiles, shape_step
from ..prompts.pairs import PairBatch
from .groups import READ_TOKENS_IN_TIME, READ_TOKENS_PER_TOKEN, prefix_groups, suffix_groups

CLUE_BYTES = 32 << 20  # clue vectors that are kept at once without gradient; larger batches compute them pass by pass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Everything that decides the passes over a batch, besides the lengths of its queries and documents.

    device, dtype: those of the LM.
    max_tokens: token budget of a pass.
    max_pairs: pairs in a suffix pass at most; None: as many as the token budget allows.
    micro_batch: the same, but only where a gradient is needed.
    with_grad: whether a gradient is needed.
    deterministic: whether each prefix, each pair's clues and each suffix is computed unpadded, one per pass.
    unpadded: whether this LM cannot read prompts of different lengths together.
    shared: whether a document is read once for all its pairs.
    prefilled: whether the prefixes of all documents are in the memory of a cache.
    in_place: whether a suffix pass reads such prefixes where they lie, so that they need not be put together for it.
    clue_per_token: whether each query token brings a clue; otherwise a pair has ``clues_per_pair``.
    clue_bytes: size of one clue vector.
    clues_of_lists: whether pairs share lists of clues, so that computing them pass by pass would repeat the work.
    """

    device: torch.device
    dtype: torch.dtype
    max_tokens: int
    max_pairs: int | None = None
    micro_batch: int | None = None
    with_grad: bool = False
    deterministic: bool = False
    unpadded: bool = False
    shared: bool = True
    prefilled: bool = False
    in_place: bool = False
    clue_per_token: bool = False
    clues_per_pair: int = 0
    clue_bytes: int = 0
    clues_of_lists: bool = False

    @property
    def one_pair(self) -> bool:
        """True if every pass reads one document or one pair."""
        return self.deterministic or self.unpadded

    @property
    def pairs_per_pass(self) -> int | None:
        """Pairs in a suffix pass at most; None: as many as the token budget allows."""
        if self.one_pair:
            return 1
        limits = [limit for limit in (self.max_pairs, self.micro_batch if self.with_grad else None) if limit]
        return min(limits, default=None)

    @property
    def recompute(self) -> bool:
        """True if suffix passes are computed again in the backward pass, which saves the memory of all but one."""
        return self.with_grad and bool(self.max_pairs or self.micro_batch)

    @property
    def document_tokens(self) -> int | None:
        """Token budget of the documents whose pairs are scored together; 1: one document; None: all documents."""
        if self.one_pair:
            return 1
        if self.prefilled and self.in_place:
            return None
        if self.with_grad and not self.prefilled:
            return self.max_tokens
        return prefix_tokens(self.max_tokens, self.device, self.prefilled)

    def clues_together(self, batch: PairBatch) -> bool:
        """Tell whether the clues of all pairs are computed together, before the passes that read them."""
        if self.deterministic:
            return False
        if self.with_grad or self.clues_of_lists:
            return True
        clues = max(map(len, batch.queries)) if self.clue_per_token else self.clues_per_pair
        return len(batch) * clues * self.clue_bytes <= CLUE_BYTES


@dataclass(frozen=True)
class Pass:
    """Documents that are read together, and the suffix passes over their pairs.

    documents: indices into ``batch.documents``.
    shared: whether a prefix pass over these documents comes first; otherwise every pair is read as a whole prompt.
    suffixes: for each suffix pass the pairs that it reads, as indices into ``batch.pairs``.
    clues_of: pairs whose clues are computed together (the same object in all passes that use them); None: those of each
        suffix pass are computed just before it.
    """

    documents: list[int]
    shared: bool
    suffixes: list[list[int]]
    clues_of: list[int] | None


def schedule(batch: PairBatch, limits: Limits, tables: Sequence[int] | None = None) -> Iterator[Pass]:
    """Yield the passes that score a batch. Each pair is in exactly one suffix pass.

    Args:
        batch: the pairs.
        limits: everything else that decides.
        tables: for each pair the rotary table that its prompt is read with; pairs of a pass share it. 0 is the table
            that prefixes are cached with, and pairs with another one are read as whole prompts. None: all are 0.
    """
    tables = [0] * len(batch) if tables is None else tables
    for table in sorted(set(tables)):
        pairs = [i for i, own in enumerate(tables) if own == table]
        own_limits = replace(limits, shared=False, prefilled=False) if table else limits
        part = batch.select(pairs)
        clues_of = pairs if own_limits.clues_together(part) else None
        worth = tokens_worth_a_pass(limits.device, limits.dtype)
        for documents in _document_groups(part, own_limits, worth):
            groups = suffix_groups(
                part,
                documents,
                limits.max_tokens,
                limits.pairs_per_pass,
                worth,
                own_limits.shared,
                limits.clue_per_token,
                shape_step(limits.device, limits.dtype),
            )
            suffixes = [[pairs[i] for i in group] for group in groups]
            yield Pass(documents, own_limits.shared, suffixes, clues_of)


def default_tokens(device: torch.device) -> int:
    """Give the token budget of a pass where nobody sets one.

    On a CPU a larger one only takes more memory: a Llama of 25 M parameters was as fast with 2048, 4096 and 8192.
    """
    return 8192 if device.type == "cuda" else 2048


def prefix_tokens(max_tokens: int, device: torch.device, prefilled: bool) -> int:
    """Give the token budget of the documents whose pairs are scored together, where no gradient is needed.

    Cached prefixes are only read, so eight times as many fit. On a CPU half the budget is as fast for prefixes that are
    computed (a Llama of 25 M parameters, 160 pairs: 8.5 s and 8.6 s) and saves 77 MB at the peak.

    Args:
        max_tokens: token budget of a pass.
        device: of the LM.
        prefilled: whether the prefixes of all documents are in the memory of a cache.
    """
    if prefilled:
        return max_tokens * READ_TOKENS_PER_TOKEN
    return max_tokens if device.type == "cuda" else max(1, max_tokens // 2)


def tokens_worth_a_pass(device: torch.device, dtype: torch.dtype) -> int:
    """Give the time that a pass takes whatever it reads, in tokens.

    Args:
        device, dtype: those of the LM.
    """
    if device.type == "cuda":
        return 1024
    return 512 if dtype == torch.bfloat16 and multiplies_bfloat16_by_tiles() else 64


def query_blocks(candidates: Sequence[int], max_pairs: int) -> Iterator[slice]:
    """Split queries into consecutive blocks of at most ``max_pairs`` pairs, but at least one query.

    Args:
        candidates: the number of documents of each query.
        max_pairs: pairs in a block.
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
    """Split pairs into lists of about ``max_pairs`` that have all pairs of each of their documents.

    The longest documents come first, so that a lack of memory shows at once.
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
    """Split pairs into lists of at most ``max_pairs`` with queries of similar length.

    For pairs whose prefixes are all in a cache, so that the pairs of a document need not stay together.
    """

    def lengths(i: int) -> tuple[int, int]:
        q, d = batch.pairs[i]
        return -len(batch.queries[q]) - batch.instruction_length(q), -len(batch.documents[d].ids)

    rows = sorted(range(len(batch)), key=lengths)
    yield from (rows[start : start + max_pairs] for start in range(0, len(rows), max_pairs))


def _document_groups(batch: PairBatch, limits: Limits, pass_tokens: int) -> Iterator[list[int]]:
    """Group the documents of the pairs; the arguments are those of `schedule` and `prefix_groups`."""
    budget = limits.document_tokens
    if budget is None:
        yield sorted({d for _, d in batch.pairs})
    else:
        yield from prefix_groups(batch, budget, pass_tokens * (READ_TOKENS_IN_TIME if limits.prefilled else 1))
