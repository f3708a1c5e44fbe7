"""The k tokens of the whole vocabulary that are most similar to a query: expansion, with no document at all.

A GEMM of the library per chunk of the table and a running `torch.topk`; nothing of size [T, V] is ever stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ops._common import block_dtype, budget, multiply, sum_dtype
from .ops.similarity_topk import inverse_norms, round_scores

CHUNK_BYTES = 4 << 20  # of similarities [rows, Q·T] at a time; budget() gives a GPU more
_MOST_ROWS = 2048  # of the table in a chunk on the CPU: a quarter faster than 8192, and an upcast copy stays small


@torch.no_grad()
def vocabulary_topk(
    query_embeds: Tensor,
    query_mask: Tensor,
    table: Tensor,
    allowed: Tensor,
    k: int,
    metric: str = "cosine",
    per_token: bool = False,
    norms: Tensor | None = None,
) -> Tensor:
    """The k allowed ids u with the largest max over t of sim(query token t, table[u]), larger first, ties to smaller u.

    Args:
        query_embeds: ``[Q, T, D]``, in the dtype of ``table``.  query_mask: ``[Q, T]`` bool.
        table: ``[V, D]``, floating.
        allowed: which ids may come out, ``[1, V]`` or ``[Q, V]`` bool.
        per_token: the k best of every query token alone, instead of the maximum over them.
        norms: 1 / norm of the rows of ``table``, `row_scales`, if they are known; ``[V]``.
    Returns: ids ``[Q, k]``, or ``[Q, T, k]`` with ``per_token``; int64, -1 where fewer are allowed or for a masked
        token.  No gradient: `similarity_topk` over the chosen ids has it.
    """
    (Q, T, D), V = query_embeds.shape, len(table)
    if metric == "cosine":
        norms = row_scales(table) if norms is None else norms
        query_embeds = query_embeds * inverse_norms(query_embeds.to(sum_dtype(table.dtype)))[..., None]
    queries = query_embeds.to(block_dtype(table)).reshape(Q * T, D).T
    lists = Q * T if per_token else Q
    best = torch.full((lists, k), _NONE, device=table.device)
    most = _MOST_ROWS if table.device.type == "cpu" else V
    rows = max(1, min(most, budget(CHUNK_BYTES, table) // (4 * Q * T)))
    for first in range(0, V, rows):
        here = slice(first, min(first + rows, V))
        similarity = multiply(table[here].to(block_dtype(table)), queries).float()  # [n, Q * T]
        if metric == "cosine":
            similarity *= norms[here, None]
        similarity = similarity.view(-1, Q, T).masked_fill_(~query_mask, -torch.inf)
        if not per_token:
            similarity = similarity.amax(2, keepdim=True)
        similarity = similarity.masked_fill(~allowed[:, here].T[:, :, None], -torch.inf)
        keys = _keys(similarity.reshape(-1, lists), first).T  # [lists, n]
        best = torch.cat([best, keys], dim=1).topk(k, dim=1).values
    ids = torch.where(best > _NONE, _LOW - (best & _LOW), -1)
    return ids.view(Q, T, k) if per_token else ids


def row_scales(table: Tensor) -> Tensor:
    """1 / norm of every row, 0 for a zero row; ``[V]`` float32."""
    return torch.cat([inverse_norms(rows.float()) for rows in table.split(_MOST_ROWS)])


_LOW = (1 << 32) - 1
_NONE = torch.iinfo(torch.int64).min


def _keys(scores: Tensor, first: int) -> Tensor:
    """Scores [n, lists] of the ids first, first + 1, ... as integers in the order (score, then smaller id).

    One `torch.topk` over them is exact in its ties; of floats it would take any of the equal ones.
    """
    bits = (round_scores(scores.contiguous()) + 0.0).view(torch.int32)  # + 0.0: -0.0 and 0.0 are one score
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    ids = torch.arange(first, first + len(scores), device=scores.device)[:, None]
    return torch.where(scores == -torch.inf, _NONE, (ordered << 32) | (_LOW - ids))
