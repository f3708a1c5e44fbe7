"""The official mean log-likelihood."""

from __future__ import annotations

import torch
from torch import Tensor

from ..prompts.pairs import PairBatch, Rows


@torch.no_grad()
def counted_tokens(log_p: Tensor, rows: Rows, batch: PairBatch, decode) -> Tensor:
    """How many tokens of each pair the official mean counts, int64 [B]: those with log p = 0 are left out.

    Args:
        log_p: of the targets of ``rows``, [N].  decode: token ids to text.
    Raises: ValueError for a pair that has no other tokens: the official code gives NaN.
    """
    counted = rows.sum_of_each_pair((log_p != 0).long())
    for i in (counted == 0).nonzero()[:1, 0].tolist():
        query = decode(list(batch.queries[batch.pairs[i][0]]))
        raise ValueError(f"compat='official', query {query!r}: every token is predicted with certainty, and the "
                         "official mean over the others would be NaN; use compat='none'")
    return counted
