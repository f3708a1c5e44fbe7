"""The count of tokens by which the official code divides a log-likelihood."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..prompts.pairs import PairBatch


@torch.no_grad()
def count_uncertain_tokens(
    log_p: Tensor,
    sum_of_each_pair: Callable[[Tensor], Tensor],
    batch: PairBatch,
    decode: Callable[[Sequence[int]], str],
) -> Tensor:
    """The number of tokens of each pair that the official mean counts, int64 [B]: those whose log p is not 0.

    Args:
        log_p: of all scored tokens, [N].
        sum_of_each_pair: adds up numbers of all scored tokens, [N], for each pair, [B].
        decode: token ids to text, for the error.
    Raises: ValueError for a pair without such a token, where the official code gives NaN.
    """
    counts = sum_of_each_pair((log_p != 0).long())
    for i in (counts == 0).nonzero()[:1, 0].tolist():
        query = decode(list(batch.queries[batch.pairs[i][0]]))
        raise ValueError(
            f"compat='official', query {query!r}: every token is predicted with certainty, and the "
            "official mean over the others would be NaN; use compat='none'"
        )
    return counts
