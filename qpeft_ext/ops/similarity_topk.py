"""Find the k tokens of each document that are most similar to a token of the query."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..utils.torch_state import refuse_backward_in_autocast
from ._checks import anywhere, check_documents, check_ids
from ._common import (
    blocks_of_rows,
    differentiable,
    distinct_rows,
    fake,
    implement,
    multiply,
    outside_autocast,
    refuse_transforms,
    rows_of,
    sum_dtype,
    with_plain_rows,
)
from ._library import uses_reference

METRICS = ("cosine", "dot")


class SimilarityTopK(NamedTuple):
    """The result of `similarity_topk`: the best tokens of each document, larger scores first."""

    scores: Tensor  # [B, k] float32 (float64 for float64 inputs); -inf where a document has fewer distinct tokens
    clue_ids: Tensor  # [B, k] int64: ids of the tokens, or -1 there
    query_positions: Tensor  # [B, k] int64: the query token with the largest similarity, or -1 there


@outside_autocast
def similarity_topk(
    query_embeds: Tensor,
    query_mask: Tensor,
    table: Tensor,
    document_ids: Tensor,
    document_mask: Tensor,
    query_index: Tensor,
    k: int,
    metric: str = "cosine",
) -> SimilarityTopK:
    """Choose the k distinct tokens u of each document with the largest max over t of sim(query token t, table[u]).

    Larger scores come first; among equal scores the id that occurs earlier in the document, and among query tokens with
    the same similarity the earliest. Scores are rounded to 17 bits: a document token that also occurs in the query has
    cosine 1 up to the order of a sum, and that order must not decide which of several such tokens are chosen.

    It runs on the CPU and on CUDA. Repeated calls on one device return the same bits, gradients included. The gradient
    of a score reaches its query token and its table row if they require one; it cannot be differentiated again.

    Args:
        query_embeds: embeddings of the query tokens, ``[Q, T, D]``, float32, float64, bfloat16 or float16.
        query_mask: True where there is a query token, ``[Q, T]``, bool; at least one per query.
        table: embeddings, ``[V, D]``, dtype and device of ``query_embeds``.
        document_ids: rows of ``table``, ``[B, S]``, int64, in ``[0, V)``; never read where ``document_mask`` is False.
        document_mask: which tokens may become clues, ``[B, S]``, bool.
        query_index: the query of each pair, ``[B]``, int64 in ``[0, Q)``.
        k: number of clues, at least 1. On CUDA at most 4096 where S > 2048.
        metric: ``"cosine"`` (0 with a zero row) or ``"dot"``.
    Returns: ``scores``, ``clue_ids`` and ``query_positions``, each ``[B, k]``; a document with fewer distinct tokens is
        padded with -inf, -1 and -1.
    Raises:
        ValueError: if shapes or devices disagree, a query has no tokens, a similarity is NaN, or k or metric is wrong.
        TypeError: if a dtype is wrong.
        IndexError: if an id is out of range. On CUDA the kernel stops with an error instead, as for NaN and for a query
            without tokens.
    Source: Q-PEFT-R, Peng et al. 2024, https://arxiv.org/abs/2404.04522.

    Example: a query of one token and a document with tokens 2, 1 and 2::

        >>> import torch
        >>> from qpeft_ext.ops import similarity_topk
        >>> table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 4.0]])
        >>> best = similarity_topk(
        ...     query_embeds=table[None, :1], query_mask=torch.tensor([[True]]),
        ...     table=table, document_ids=torch.tensor([[2, 1, 2]]),
        ...     document_mask=torch.tensor([[True, True, True]]), query_index=torch.tensor([0]), k=3,
        ... )
        >>> best.clue_ids, best.scores
        (tensor([[ 2,  1, -1]]), tensor([[0.6000, 0.0000,   -inf]]))
    """
    check_similarity_topk(query_embeds, query_mask, table, document_ids, document_mask, query_index, k, metric)
    documents = (document_ids, document_mask, query_index)
    if uses_reference(table.device):
        found = reference(query_embeds, query_mask, table, *documents, k, metric)
        return found._replace(scores=refuse_backward_in_autocast(found.scores))
    refuse_transforms("similarity_topk", query_embeds, table)
    inputs = (query_embeds, query_mask, with_plain_rows(table), *documents)
    return SimilarityTopK(*torch.ops.qpeft_ext.similarity_topk(*inputs, k, metric)[:3])


def check_similarity_topk(query_embeds, query_mask, table, document_ids, document_mask, query_index, k, metric) -> None:
    op = "similarity_topk"
    check_documents(op, query_embeds, query_mask, table, document_ids, document_mask, query_index)
    if k < 1:
        raise ValueError(f"{op}: k must be at least 1, got {k}")
    if metric not in METRICS:
        raise ValueError(f"{op}: metric must be one of {METRICS}, got {metric!r}")
    if query_mask.shape[0] and not query_mask.shape[1]:
        raise ValueError(f"{op}: every query needs a token, got T = 0")


def reference(
    query_embeds, query_mask, table, document_ids, document_mask, query_index, k, metric="cosine"
) -> SimilarityTopK:
    """Compute `similarity_topk` by its definition, in plain PyTorch."""
    check_ids("similarity_topk", "document_ids", document_ids, len(table), "V", document_mask)
    check_ids("similarity_topk", "query_index", query_index, len(query_embeds), "Q")
    if anywhere(~query_mask.any(1)):
        raise ValueError("similarity_topk: every query needs a token, a row of query_mask is all False")
    if not query_mask.shape[1]:  # there is no query either; a maximum over T needs a token
        query_embeds, query_mask = query_embeds.new_zeros(0, 1, table.shape[1]), query_mask.new_ones(0, 1)
    ids = document_ids.where(document_mask, 0)
    dtype = sum_dtype(table.dtype)
    queries = query_embeds.masked_fill(~query_mask[:, :, None], 0)[query_index].to(dtype)  # [B, T, D]
    documents = rows_of(table, document_ids, document_mask).to(dtype)  # [B, S, D]
    if metric == "cosine":
        queries, documents = _unit(queries), _unit(documents)
    similarity = queries @ documents.mT  # [B, T, S]
    best, positions = similarity.masked_fill(~query_mask[query_index][:, :, None], -torch.inf).max(1)
    if anywhere(best.isnan() & document_mask):
        raise ValueError(f"similarity_topk: a similarity is NaN, {_WHAT_TO_CHECK}")
    best = best + torch.where(best.isfinite(), round_scores(best.detach()) - best.detach(), 0)  # its gradient is 1
    equal = (ids[:, :, None] == ids[:, None, :]) & document_mask[:, None, :]
    repeated = equal.tril(-1).any(2)  # the same id stands earlier
    missing = max(k - ids.shape[1], 0)
    found = torch.nn.functional.pad(document_mask & ~repeated, (0, missing))
    best, positions, ids = (torch.nn.functional.pad(x, (0, missing)) for x in (best, positions, ids))
    scores, order = best.masked_fill(~found, -torch.inf).sort(dim=1, descending=True, stable=True)
    order = order[:, :k]
    found = found.gather(1, order)
    return SimilarityTopK(
        scores[:, :k], ids.gather(1, order).where(found, -1), positions.gather(1, order).where(found, -1)
    )


def round_scores(scores: Tensor) -> Tensor:
    """Round to 17 of 23 mantissa bits (float64: 44 of 52), so that scores that are equal up to noise become equal."""
    integer, dropped = (torch.int64, 8) if scores.dtype == torch.float64 else (torch.int32, 6)
    return ((scores.view(integer) + (1 << (dropped - 1))) & -(1 << dropped)).view(scores.dtype)


_WHAT_TO_CHECK = "check query_embeds and table for NaN and infinity"


def inverse_norms(x: Tensor) -> Tensor:
    """Return 1 / norm over the last axis, 0 for a zero row."""
    norms = x.norm(dim=-1)
    return torch.where(norms == 0, 0, 1 / norms.masked_fill(norms == 0, 1))


def _unit(x: Tensor) -> Tensor:
    return x * inverse_norms(x)[..., None]


# ---- the operator: primitives are in csrc/ops.cpp; on CUDA the whole forward is one function of C++ ------------------


@implement("similarity_topk", "cpu")
def _forward(query_embeds, query_mask, table, document_ids, document_mask, query_index, k, metric):
    """Multiply blocks of distinct rows with the query tokens, take the maximum over T, then the best k per document."""
    op, (Q, T, D), cosine = "similarity_topk", query_embeds.shape, metric == "cosine"
    check_ids(op, "document_ids", document_ids, table.shape[0], "V", document_mask)
    check_ids(op, "query_index", query_index, Q, "Q")
    if not query_mask.any(1).all():
        raise ValueError(f"{op}: every query needs a token, a row of query_mask is all False")
    # Side by side (M = Q) the queries share one GEMM over the union of their ids, which reads each row once. Reading a
    # row costs about as much as multiplying it with one query, so queries that share few ids get a GEMM each.
    M, groups = Q, 1
    documents = distinct_rows(document_ids, document_mask, torch.zeros_like(query_index), 1, table.shape[0])
    if Q > 1:
        apart = distinct_rows(document_ids, document_mask, query_index, Q, table.shape[0])
        if 2 * apart.offsets[-1] < (1 + Q) * documents.offsets[-1]:
            M, groups, documents = 1, Q, apart
    query_mask = query_mask.reshape(groups, M, T).contiguous()
    queries = query_embeds.to(sum_dtype(table.dtype))
    query_scales = inverse_norms(queries).reshape(groups, M * T)
    queries = queries.reshape(groups, M * T, D)
    best = table.new_empty(M, documents.offsets[-1], dtype=sum_dtype(table.dtype))
    positions = best.new_empty(best.shape, dtype=torch.int32)
    row_norms = best.new_empty(best.shape[1])
    for g in range(groups):
        blocks = blocks_of_rows(table, documents.rows, documents.offsets[g], documents.offsets[g + 1], norms=cosine)
        for here, block, norms in blocks:
            similarity = multiply(block, queries[g].mT)  # [n, M * T]
            if norms is not None:
                similarity *= query_scales[g]
                row_norms[here] = norms
            torch.ops.qpeft_ext.similarity_topk_reduce(
                similarity, norms, query_mask[g], best[:, here], positions[:, here]
            )
    if best.isnan().any():
        raise ValueError(f"{op}: a similarity is NaN, {_WHAT_TO_CHECK}")
    best_row = query_index.contiguous() if groups == 1 else torch.zeros_like(query_index)
    return torch.ops.qpeft_ext.similarity_topk_select(
        round_scores(best), positions, best_row, row_norms if cosine else None, documents.ids, documents.slots, k
    )


@fake("similarity_topk")
def _(query_embeds, query_mask, table, document_ids, document_mask, query_index, k, metric):
    B = document_ids.shape[0]
    scores = table.new_empty(B, k, dtype=sum_dtype(table.dtype))
    return scores, document_ids.new_empty(B, k), document_ids.new_empty(B, k), torch.empty_like(scores)


@implement("similarity_topk_backward")
def _backward(
    grad_scores, scores, clue_ids, query_positions, row_norms, query_embeds, table, query_index, metric, want_table
):
    """Sum rows weighted by the gradients, over the clues of a query token and over the query tokens of a clue.

    d cosine / d q = (unit(e) - cosine * unit(q)) / |q|, and the same with e and q exchanged. All sizes are bounds that
    do not depend on the data, so nothing waits for a GPU; padding is sorted to the end, after the last segment.
    """
    (Q, T, D), V, cosine, dtype = query_embeds.shape, table.shape[0], metric == "cosine", sum_dtype(table.dtype)
    chosen = (clue_ids >= 0).flatten()
    token, ids = (query_index[:, None] * T + query_positions).flatten(), clue_ids.flatten()
    grad, norms = grad_scores.to(dtype).flatten(), row_norms.flatten()  # 1 / norm
    weights, along = grad * norms, grad * scores.flatten()  # along: the part of the gradient along the vector itself

    by_token, begins = _segments(token.where(chosen, Q * T), Q * T)
    hit = begins[1:] > begins[:-1]
    queries = query_embeds.reshape(Q * T, D).to(dtype).where(hit[:, None], 0)  # the others may be NaN
    grad_query = _weighted_rows(table, ids[by_token], weights[by_token], begins)
    if cosine:
        scales = inverse_norms(queries)[:, None]
        queries = queries * scales
        grad_query = (grad_query - _weighted_rows(along[:, None], by_token, None, begins) * queries) * scales
    grad_query = grad_query.view(Q, T, D).to(query_embeds.dtype)
    if not want_table:
        return grad_query, table.new_empty(0)

    most = min(ids.shape[0], V)  # of distinct clues
    ordered, by_id = ids.where(chosen, V).sort(stable=True)
    begin = torch.ones_like(ordered, dtype=torch.bool)
    begin[1:] = ordered[1:] != ordered[:-1]
    rank = (begin.cumsum(0) - 1).where(ordered < V, most)
    begins = torch.searchsorted(rank, torch.arange(most + 1, device=ids.device))
    rows = torch.cat((ordered, ordered.new_full((1,), V)))[begins[:-1]]  # the clue of each rank, or V
    grad_rows = _weighted_rows(queries, token[by_id], weights[by_id], begins)
    if cosine:
        loss = _weighted_rows((along * norms.square())[:, None], by_id, None, begins)
        grad_rows -= loss * table[rows.clamp_max(max(V - 1, 0))].to(dtype).masked_fill_(rows[:, None] == V, 0)
    grad_table = table.new_zeros(V + 1, D).index_copy_(0, rows, grad_rows.to(table.dtype))
    return grad_query, grad_table[:V]


def _weighted_rows(source: Tensor, rows: Tensor, weights: Tensor | None, offsets: Tensor) -> Tensor:
    """Return the sum of source[rows[e]] * weights[e] over each segment, [segments, columns of source]."""
    sums = source.new_empty(len(offsets) - 1, source.shape[1], dtype=sum_dtype(source.dtype))
    torch.ops.qpeft_ext.weighted_rows(source, rows, weights, offsets, False, sums)
    return sums


def _segments(keys: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Sort ``keys`` [E] (stable); return the order, and where in it the keys 0 .. size - 1 begin, [size + 1]."""
    ordered, order = keys.sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(size + 1, device=keys.device))


@fake("similarity_topk_backward")
def _(grad_scores, scores, clue_ids, query_positions, row_norms, query_embeds, table, query_index, metric, want_table):
    # contiguous whatever the strides of the inputs are: torch.compile asserts the strides that it finds here
    return query_embeds.new_empty(query_embeds.shape), table.new_empty(table.shape if want_table else 0)


def _setup_context(ctx, inputs, output) -> None:
    query_embeds, _, table, _, _, query_index, _, ctx.metric = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(query_embeds, table, query_index, *output)


def _autograd(ctx, grad_scores, *_):
    query_embeds, table, query_index, *output = ctx.saved_tensors
    want_table = ctx.needs_input_grad[2]
    grad_query, grad_table = torch.ops.qpeft_ext.similarity_topk_backward(
        grad_scores.contiguous(), *output, query_embeds, table, query_index, ctx.metric, want_table
    )
    return grad_query, None, grad_table if want_table else None, None, None, None, None, None


differentiable("similarity_topk", _setup_context, _autograd)
