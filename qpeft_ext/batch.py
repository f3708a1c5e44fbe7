"""Query–document pairs as token ids, and the padded rows that the LM reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from .prompt import Document, DocumentPrefix, Prompt, SuffixPieces, document_text

try:
    from ._host import pack_ragged
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
    """

    queries: list[tuple[int, ...]]
    documents: list[DocumentPrefix]
    pairs: list[tuple[int, int]]
    candidates: list[list[int]] | None = None

    @classmethod
    def from_text(
        cls, prompt: Prompt, pairs: Sequence[tuple[str, Document]], lists: Sequence[int] | None = None
    ) -> PairBatch:
        """Tokenise each distinct query and document text once; the order of the pairs is kept.

        lists: the list of candidates that each pair belongs to; the same query in two lists counts as two queries.
        """
        queries: dict[tuple[str, int], int] = {}
        documents: dict[str, int] = {}
        kept: list[Document] = []
        index = []
        for (query, document), which in zip(pairs, repeat(0, len(pairs)) if lists is None else lists, strict=True):
            if not isinstance(query, str):
                prompt.queries([query])  # raises
            text = document_text(document)
            if text not in documents:
                documents[text] = len(documents)
                kept.append(document)
            index.append((queries.setdefault((query, which), len(queries)), documents[text]))
        candidates = paired_documents(index, len(queries))
        return cls(prompt.queries([query for query, _ in queries]), prompt.documents(kept), index, candidates)

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
    """B right-padded rows of LM input, L tokens wide.

    ids [B, L] int64, 0 at clue slots and padding; mask [B, L] int64; positions [B, L] int64.
    clue_slots: flat indices into [B·L] of the clue vectors, in the order of ``Clues.embeds[Clues.mask]``.
    before_query: flat indices of the slot *before* each query token, [N]; target_ids: those tokens, [N].
    pair_of_target, place_of_target: pair and place in the query of each target, [N].
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    clue_slots: Tensor
    before_query: Tensor
    target_ids: Tensor
    pair_of_target: Tensor
    place_of_target: Tensor


def assemble_rows(
    batch: PairBatch, pieces: SuffixPieces, clue_counts: Sequence[int], device, with_prefix: bool
) -> Rows:
    """Lay out the suffixes of the pairs, or with ``with_prefix`` their whole prompts (the plain path).

    Only clues that exist take a slot: a gap inside a row would be counted by sliding windows.
    """
    rows, starts, slots, before, targets, owners, places = [], [], [], [], [], [], []
    for (query_index, document_index), count in zip(batch.pairs, clue_counts, strict=True):
        prefix, query = batch.documents[document_index].ids, batch.queries[query_index]
        row = list(prefix) if with_prefix else []
        if count:
            row += pieces.hints
            slots.append((len(rows), len(row), count))
            row += [0] * count
            row += pieces.question
        else:
            row += pieces.bare_question
        before.append((len(rows), len(row) - 1, len(query)))
        row += query
        targets += query
        owners += [len(rows)] * len(query)
        places += range(len(query))
        rows.append(row)
        starts.append(0 if with_prefix else len(prefix))
    ids, mask = pad(rows, device)
    width = ids.shape[1]

    def flat(spans: list[tuple[int, int, int]]) -> Tensor:
        return _long([row * width + place + i for row, place, count in spans for i in range(count)], device)

    positions = _long(starts, device)[:, None] + torch.arange(width, device=device)
    return Rows(
        ids,
        mask.long(),
        positions,
        flat(slots),
        flat(before),
        _long(targets, device),
        _long(owners, device),
        _long(places, device),
    )


def pad(rows: Sequence[Sequence[int]], device) -> tuple[Tensor, Tensor]:
    """Right-pad lists of ids with 0: ids [B, L] int64 and mask [B, L] bool."""
    values, offsets = pack_ragged(rows)
    lengths = np.diff(offsets)
    mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
    ids = np.zeros(mask.shape, dtype=np.int64)
    ids[mask] = values
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def _long(values: list, device) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=device)
