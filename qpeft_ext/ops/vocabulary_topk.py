"""Find the k tokens of the whole vocabulary that are most similar to a query, which expands it without a document.

Each chunk of the table is multiplied with the query tokens, and what is better than the k-th best so far goes through
`torch.topk`. Nothing of size [T, V] is ever stored.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._common import block_dtype, budget, multiply_rows, outside_autocast, sum_dtype
from .similarity_topk import inverse_norms, round_scores

CHUNK_BYTES = 4 << 20  # of similarities [rows, Q * T] at a time; budget() gives a GPU more
_MOST_ROWS = 8192  # of the table in a chunk on the CPU; with 2048 the steps around the GEMM took a tenth of the time
_MOST_UPCAST_ROWS = 512  # where the table is not float32: the converted rows stay in the cache for the GEMM


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
    row_inverse_norms: Tensor | None = None,
) -> Tensor:
    """Find the k allowed ids u with the largest max over t of sim(query token t, table[u]), ties to the smaller id.

    The order does not depend on the device or on how the table is cut into chunks.

    Args:
        query_embeds: ``[Q, T, D]``, in the dtype of ``table``.
        query_mask: True where there is a query token, ``[Q, T]``, bool.
        table: embeddings, ``[V, D]``, floating.
        allowed: which ids may be returned, ``[1, V]`` or ``[Q, V]``, bool.
        k: number of ids.
        metric: ``"cosine"`` or ``"dot"``.
        per_token: return the k best ids of every query token, instead of those of the maximum over the tokens.
        row_inverse_norms: 1 / norm of each row of ``table`` (`row_scales`), if it is known; ``[V]``, float32.
    Returns: ids, larger similarity first, ``[Q, k]``, or ``[Q, T, k]`` with ``per_token``; int64; -1 where fewer are
        allowed and for a masked token.  There is no gradient: `similarity_topk` over the chosen ids has one.
    """
    Q, T, D = query_embeds.shape
    if not (Q and T and k):
        return torch.full((Q, T, k) if per_token else (Q, k), -1, device=table.device)
    scales = None
    if metric == "cosine":
        scales = row_scales(table) if row_inverse_norms is None else row_inverse_norms
        query_embeds = query_embeds * inverse_norms(query_embeds.to(sum_dtype(table.dtype)))[..., None]
    # Every masked token is replaced by the first token of its query, so that the maximum over T needs no mask.
    tokens = torch.arange(T, device=table.device).where(query_mask, query_mask.long().argmax(1, keepdim=True))
    query_embeds = query_embeds.take_along_dim(tokens[..., None], dim=1)
    queries = query_embeds.to(block_dtype(table)).reshape(Q * T, D)
    there = query_mask.flatten() if per_token else query_mask.any(1)
    best = torch.full((len(there), k), _NONE, device=table.device)
    floor = torch.where(there, -torch.inf, torch.inf)  # scores above it enter a list; so does NaN, an error later
    for first, rows in _chunks(table, queries):
        here = slice(first, first + len(rows))
        scores = multiply_rows(rows, queries).float().view(-1, Q, T)
        if not per_token:
            scores = scores.amax(2, keepdim=True)
        if scales is not None:
            scores *= scales[here, None, None]  # after the maximum, which it cannot move: no norm is negative
        scores = scores.masked_fill_(~allowed[:, here].T[:, :, None], -torch.inf).flatten(1)  # [n, lists]
        ids = torch.arange(here.start, here.stop, device=table.device)
        if table.device.type == "cpu":  # few rows of a chunk enter a list; on a GPU finding them would mean waiting
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
    """Yield consecutive rows of the table in the dtype of the queries [N, D]: (the id of the first, [n, D])."""
    upcast = queries.dtype != table.dtype
    most = max(1, budget(CHUNK_BYTES, table) // (4 * len(queries)))
    if table.device.type == "cpu":
        most = min(most, _MOST_UPCAST_ROWS if upcast else _MOST_ROWS)
    buffer = queries.new_empty(min(most, len(table)), table.shape[1]) if upcast else None
    for first in range(0, len(table), most):
        rows = table[first : first + most]
        yield first, rows if buffer is None else buffer[: len(rows)].copy_(rows)


def row_scales(table: Tensor) -> Tensor:
    """Return 1 / norm of every row of the table, 0 for a zero row; ``[V]`` float32."""
    return torch.cat([inverse_norms(rows.float()) for rows in table.split(_MOST_UPCAST_ROWS)])


_LOW = (1 << 32) - 1
_NONE = torch.iinfo(torch.int64).min


def _keys(scores: Tensor, ids: Tensor) -> Tensor:
    """Turn scores [n, lists] of n ids into integers that are larger for a larger score, then for a smaller id.

    No two are equal, so `torch.topk` has no ties to break; among equal floats it would choose arbitrarily.
    """
    bits = (round_scores(scores.contiguous()) + 0.0).view(torch.int32)  # + 0.0: -0.0 and 0.0 are one score
    return (_in_order(bits).long() << 32) | (_LOW - ids[:, None])


def _scores(keys: Tensor) -> Tensor:
    """Return the rounded scores that are in the keys, float32; -inf where there is none."""
    return _in_order((keys >> 32).int()).view(torch.float32).masked_fill(keys == _NONE, -torch.inf)


def _in_order(bits: Tensor) -> Tensor:
    """Turn the bits of a float32 into an integer that compares as the float does, or back: it is its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
