"""Query–document pairs as token ids, and the padded rows that the LM reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from .prompt import CluesFirstPieces, Document, DocumentPrefix, Prompt, SuffixPieces, document_text

try:
    from .._host import pack_ragged
except ImportError:  # not built: QPEFT_REFERENCE=1

    def pack_ragged(lists):
        """CSR arrays of lists of ids: values [N], offsets [rows + 1], int64."""
        offsets = np.cumsum([0, *map(len, lists)], dtype=np.int64)
        return np.fromiter((i for ids in lists for i in ids), dtype=np.int64, count=offsets[-1]), offsets


@dataclass
class PairBatch:
    """B query–document pairs over *distinct* queries and documents.

    queries: token ids of Q queries.  documents: prefixes of N documents.
    pairs: B times (query index, document index).
    candidates: of each query, the indices of the documents that it is ranked among (for ``source="candidates"``);
        None: those that it is paired with.
    cut_queries: how many queries were cut to ``max_query_tokens``.
    """

    queries: list[tuple[int, ...]]
    documents: list[DocumentPrefix]
    pairs: list[tuple[int, int]]
    candidates: list[list[int]] | None = None
    cut_queries: int = 0

    @classmethod
    def from_text(
        cls, prompt: Prompt, pairs: Sequence[tuple[str, Document]], lists: Sequence[int] | None = None,
        truncate_queries: bool = False,
    ) -> PairBatch:
        """Tokenise each distinct query and document text once; the order of the pairs is kept.

        lists: the list of candidates that each pair belongs to; the same query in two lists counts as two queries.
        truncate_queries: cut queries that are longer than ``max_query_tokens`` at their end, instead of an error.
        """
        queries: dict[tuple[str, int], int] = {}
        documents: dict[str, int] = {}
        kept: list[Document] = []
        index = []
        for (query, document), which in zip(pairs, repeat(0, len(pairs)) if lists is None else lists, strict=True):
            text = document_text(document)
            if text not in documents:
                documents[text] = len(documents)
                kept.append(document)
            index.append((queries.setdefault((query, which), len(queries)), documents[text]))
        candidates = paired_documents(index, len(queries))
        cut: list[int] | None = [] if truncate_queries else None
        query_ids = prompt.queries([query for query, _ in queries], cut)
        return cls(query_ids, prompt.documents(kept), index, candidates, len(cut or ()))

    def __len__(self) -> int:
        return len(self.pairs)

    def select(self, pair_rows: Sequence[int]) -> PairBatch:
        """The same queries and documents with some of the pairs."""
        return PairBatch(self.queries, self.documents, [self.pairs[i] for i in pair_rows], self.candidates)


def paired_documents(pairs: Sequence[tuple[int, int]], num_queries: int) -> list[list[int]]:
    """Of each query, the distinct documents that it is paired with, in order."""
    found: list[dict[int, None]] = [{} for _ in range(num_queries)]
    for query, document in pairs:
        found[query][document] = None
    return [list(documents) for documents in found]


@dataclass
class ClueInputs:
    """What a clue module reads: Q padded queries, B padded documents, and which query each document is paired with.

    query_ids [Q, T], document_ids [B, S] int64; query_mask [Q, T], document_mask [B, S] bool; query_index [B] int64.
    With ``source="candidates"`` the rows of document_ids and document_mask, [Q, S], are the concatenated candidates of
    each query instead.
    """

    query_ids: Tensor
    query_mask: Tensor
    document_ids: Tensor
    document_mask: Tensor
    query_index: Tensor

    @classmethod
    def from_batch(cls, batch: PairBatch, device, source: str = "document") -> ClueInputs:
        used = sorted({query for query, _ in batch.pairs})
        place = {query: i for i, query in enumerate(used)}
        query_ids, query_mask = pad([batch.queries[query] for query in used], device)
        if source == "candidates":
            candidates = batch.candidates or paired_documents(batch.pairs, len(batch.queries))
            rows = [[i for d in candidates[query] for i in batch.documents[d].document_ids] for query in used]
        else:
            rows = [batch.documents[d].document_ids for _, d in batch.pairs]
        document_ids, document_mask = pad(rows, device)
        query_index = torch.tensor([place[query] for query, _ in batch.pairs], dtype=torch.long, device=device)
        return cls(query_ids, query_mask, document_ids, document_mask, query_index)


@dataclass
class Rows:
    """B right-padded rows of LM input, L tokens wide. The last query token is only a target: nobody reads its output.

    ids [B, L] int64, 0 at clue slots and padding; mask [B, L] int64; positions [B, L] int64.
    clue_slots: flat indices into [B·L] of the clue vectors, in the order of ``Clues.embeds[Clues.mask]``.
    before_query: flat indices of the slot *before* each query token, [N]; target_ids: those tokens, [N].
    target_slots: flat indices into [B, T] of the targets, [N], where ``longest_query`` is T.
    end: one more than the largest position of a token.
    suffix: bool [B, L], which slots of a whole prompt belong to its suffix; None where the rows are suffixes only.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    clue_slots: Tensor
    before_query: Tensor
    target_ids: Tensor
    target_slots: Tensor
    longest_query: int
    end: int
    suffix: Tensor | None = None

    @property
    def read(self) -> Tensor:
        """Flat indices of the slots whose output is read, each once."""
        return self.before_query

    def sum_of_each_pair(self, of_targets: Tensor) -> Tensor:
        """Sums over the targets of each pair, [N] -> [B]; through a table [B, T], so that their order is fixed."""
        table = of_targets.new_zeros(len(self.ids) * self.longest_query)
        return table.index_copy(0, self.target_slots, of_targets).view(len(self.ids), -1).sum(1)


def assemble_rows(
    batch: PairBatch, pieces: SuffixPieces | CluesFirstPieces, clue_counts: Sequence[int], device, with_prefix: bool,
    width_step: int = 1, spare: int = 0,
) -> Rows:
    """Lay out the suffixes of the pairs, or with ``with_prefix`` their whole prompts (the plain path).

    width_step: L becomes a multiple of it.  spare: slots of padding after the longest row that count in ``end``.

    Only clues that exist take a slot: a gap inside a row would be counted by sliding windows.
    """
    queries = [pieces.scored(batch.queries[q]) for q, _ in batch.pairs]
    rows, clue_starts, suffix_starts = [], [], []
    for (_, document_index), query, count in zip(batch.pairs, queries, clue_counts, strict=True):
        document = batch.documents[document_index].ids if with_prefix else ()
        row, clue_start, suffix_start = pieces.lay_out(document, count)
        rows.append(row + query[:-1])
        clue_starts.append(clue_start)
        suffix_starts.append(suffix_start)
    prefix_lengths = np.array([len(batch.documents[d].ids) for _, d in batch.pairs])
    query_lengths = np.array([len(query) for query in queries])
    lengths, counts = np.array([len(row) for row in rows]), np.array(clue_counts)
    width, longest_query = -(-int(lengths.max() + spare) // width_step) * width_step, int(query_lengths.max())
    first_slots = np.arange(len(rows)) * width
    starts = np.zeros_like(lengths) if with_prefix else prefix_lengths
    suffix = to_device(np.arange(width) >= np.array(suffix_starts)[:, None], device) if with_prefix else None
    ids, mask = pad(rows, device, width)
    return Rows(
        ids,
        mask.long(),
        to_device(starts[:, None] + np.arange(width), device),
        to_device(_spans(first_slots + np.array(clue_starts), counts), device),
        to_device(_spans(first_slots + lengths - query_lengths, query_lengths), device),
        to_device(pack_ragged(queries)[0], device),
        to_device(_spans(np.arange(len(rows)) * longest_query, query_lengths), device),
        longest_query,
        int((starts + lengths).max()) + spare,
        suffix,
    )


def _spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, … for every span, one after the other."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)


def pad(rows: Sequence[Sequence[int]], device, width: int = 0) -> tuple[Tensor, Tensor]:
    """Right-pad lists of ids with 0, to ``width`` at least: ids [B, L] int64 and mask [B, L] bool."""
    values, offsets = pack_ragged(rows)
    lengths = np.diff(offsets)
    mask = np.arange(lengths.max(initial=width)) < lengths[:, None]
    ids = np.zeros(mask.shape, dtype=np.int64)
    ids[mask] = values
    return to_device(ids, device), to_device(mask, device)


def to_device(array: np.ndarray, device) -> Tensor:
    """A tensor of the array; through pinned memory to a GPU, so that the host need not wait for the copy."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
