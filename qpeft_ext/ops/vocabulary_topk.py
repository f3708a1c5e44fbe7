"""The k tokens of the whole vocabulary that are most similar to a query: expansion, with no document at all.

A GEMM of the library per chunk of the table and a running `torch.topk` of what is better than the k-th so far;
nothing of size [T, V] is ever stored.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._common import block_dtype, budget, multiply_rows, outside_autocast, sum_dtype
from .similarity_topk import inverse_norms, round_scores

CHUNK_BYTES = 4 << 20  # of similarities [rows, Q·T] at a time; budget() gives a GPU more
_MOST_ROWS = 8192  # of the table in a chunk on the CPU; of 2048 the small steps took a tenth of the time
_MOST_UPCAST_ROWS = 512  # of a table that is not float32: what is converted stays in the cache for the GEMM


@outside_autocast
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
    Q, T, D = query_embeds.shape
    if metric == "cosine":
        norms = row_scales(table) if norms is None else norms
        query_embeds = query_embeds * inverse_norms(query_embeds.to(sum_dtype(table.dtype)))[..., None]
    # its query's first token stands for a masked one: the maximum over T then needs no mask
    tokens = torch.arange(T, device=table.device).where(query_mask, query_mask.long().argmax(1, keepdim=True))
    query_embeds = query_embeds.take_along_dim(tokens[..., None], dim=1)
    queries = query_embeds.to(block_dtype(table)).reshape(Q * T, D)
    there = query_mask.flatten() if per_token else query_mask.any(1)
    best = torch.full((len(there), k), _NONE, device=table.device)
    floor = torch.where(there, -torch.inf, torch.inf)  # what is above it enters a list, as does NaN: an error later
    for first, rows in _chunks(table, queries):
        here = slice(first, first + len(rows))
        scores = multiply_rows(rows, queries).float().view(-1, Q, T)
        if not per_token:
            scores = scores.amax(2, keepdim=True)
        if metric == "cosine":
            scores *= norms[here, None, None]  # behind the maximum, which it does not move: no norm is negative
        scores = scores.masked_fill_(~allowed[:, here].T[:, :, None], -torch.inf).flatten(1)  # [n, lists]
        ids = torch.arange(here.start, here.stop, device=table.device)
        if table.device.type == "cpu":  # a few rows of a chunk enter a list; a GPU would have to be waited for
            entering = (~(scores <= floor)).any(1).nonzero()[:, 0]
            if not len(entering):
                continue
            scores, ids = scores[entering], ids[entering]
        keys = torch.where(scores <= floor, _NONE, _keys(scores, ids)).T  # [lists, n]
        best = torch.cat([best, keys], dim=1).topk(k, dim=1).values
        floor = floor.maximum(_scores(best[:, -1]))
    ids = torch.where(best > _NONE, _LOW - (best & _LOW), -1)
    return ids.view(Q, T, k) if per_token else ids


def _chunks(table: Tensor, queries: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Consecutive rows of the table in the dtype of the queries [N, D]: (the first one's id, [n, D])."""
    upcast = queries.dtype != table.dtype
    most = max(1, budget(CHUNK_BYTES, table) // (4 * len(queries)))
    if table.device.type == "cpu":
        most = min(most, _MOST_UPCAST_ROWS if upcast else _MOST_ROWS)
    buffer = queries.new_empty(min(most, len(table)), table.shape[1]) if upcast else None
    for first in range(0, len(table), most):
        rows = table[first : first + most]
        yield first, buffer[: len(rows)].copy_(rows) if upcast else rows


def row_scales(table: Tensor) -> Tensor:
    """1 / norm of every row, 0 for a zero row; ``[V]`` float32."""
    return torch.cat([inverse_norms(rows.float()) for rows in table.split(_MOST_UPCAST_ROWS)])


_LOW = (1 << 32) - 1
_NONE = torch.iinfo(torch.int64).min


def _keys(scores: Tensor, ids: Tensor) -> Tensor:
    """Scores [n, lists] of n ids as integers in the order (score, then smaller id).

    One `torch.topk` over them is exact in its ties; of floats it would take any of the equal ones.
    """
    bits = (round_scores(scores.contiguous()) + 0.0).view(torch.int32)  # + 0.0: -0.0 and 0.0 are one score
    return (_in_order(bits).long() << 32) | (_LOW - ids[:, None])


def _scores(keys: Tensor) -> Tensor:
    """The rounded scores that are in the keys, float32; -inf for none."""
    return _in_order((keys >> 32).int()).view(torch.float32).masked_fill(keys == _NONE, -torch.inf)


def _in_order(bits: Tensor) -> Tensor:
    """Bits of a float32 as an integer that compares as the float does; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
