"""The input of clue modules: padded queries and documents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..prompts.pairs import PairBatch, pad, paired_documents


@dataclass
class ClueInputs:
    """Token ids of Q queries and of the documents of B pairs, padded.

    Attributes:
        query_ids, query_mask: [Q, T], int64 and bool.
        document_ids, document_mask: [B, S], int64 and bool. With ``source="candidates"`` they are the concatenated
            candidates of each query instead, [Q, S].
        query_index: the query of each pair, int64 [B].
    """

    query_ids: Tensor
    query_mask: Tensor
    document_ids: Tensor
    document_mask: Tensor
    query_index: Tensor

    @classmethod
    def from_batch(cls, batch: PairBatch, device: torch.device, source: str = "document") -> ClueInputs:
        """The input for the pairs of a batch; ``source``: that of the config."""
        used = sorted({query for query, _ in batch.pairs})
        place = {query: i for i, query in enumerate(used)}
        query_ids, query_mask = pad([batch.queries[query] for query in used], device)
        if source == "candidates":
            candidates = batch.candidates or paired_documents(batch.pairs, len(batch.queries))
            rows = [tuple(i for d in candidates[query] for i in batch.documents[d].document_ids) for query in used]
        else:
            rows = [batch.documents[d].document_ids for _, d in batch.pairs]
        document_ids, document_mask = pad(rows, device)
        query_index = torch.tensor([place[query] for query, _ in batch.pairs], dtype=torch.long, device=device)
        return cls(query_ids, query_mask, document_ids, document_mask, query_index)
