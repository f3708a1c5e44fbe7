"""The official mean log-likelihood."""

from __future__ import annotations

import torch
from torch import Tensor

from ..prompts.pairs import PairBatch


@torch.no_grad()
def counted_tokens(counted: Tensor, batch: PairBatch, decode) -> Tensor:
    """How many tokens of each pair the official mean counts: ``counted``, if no pair has none.

    Args:
        counted: the number of tokens of each pair whose log p is not 0, int64 [B].
        decode: token ids to text, for the error.
    Raises: ValueError for a pair without such a token, where the official code gives NaN.
    """
    for i in (counted == 0).nonzero()[:1, 0].tolist():
        query = decode(list(batch.queries[batch.pairs[i][0]]))
        raise ValueError(
            f"compat='official', query {query!r}: every token is predicted with certainty, and the "
            "official mean over the others would be NaN; use compat='none'"
        )
    return counted
