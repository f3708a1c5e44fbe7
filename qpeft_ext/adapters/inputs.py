"""What a clue module reads: padded queries and documents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..prompts.pairs import PairBatch, pad, paired_documents


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
