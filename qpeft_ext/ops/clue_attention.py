"""Multi-head attention of the query's tokens over the tokens of each document."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from ._checks import check_documents, check_ids, expect_like, expect_shape
from ._common import (
    differentiable,
    fake,
    implement,
    outside_autocast,
    refuse_forward_mode,
    rows_of,
    sum_dtype,
    with_plain_rows,
)
from ._library import uses_reference
from ._pairs import Pairs, shared_rows


@outside_autocast
def clue_attention(
    query_embeds: Tensor,
    query_mask: Tensor,
    table: Tensor,
    document_ids: Tensor,
    document_mask: Tensor,
    query_index: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    w_o: Tensor,
    b_q: Tensor | None = None,
    b_k: Tensor | None = None,
    b_v: Tensor | None = None,
    b_o: Tensor | None = None,
    *,
    num_heads: int,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``torch.nn.MultiheadAttention``: queries are the query's tokens, keys and values ``table[document_ids]``.

    q = x @ w_q.T + b_q; heads are consecutive slices of D; scale 1 / sqrt(D / H); result = concat @ w_o.T + b_o.
    No dropout. float32 is not rounded to tf32 between the projections; those with w_q, w_k and w_o are GEMMs of torch's
    autograd and follow torch's setting (off unless you turn it on).

    Args:
        query_embeds: ``[Q, T, D]``, floating.
        query_mask: True where there is a query token, ``[Q, T]``, bool.
        table: embeddings, ``[V, D]``, dtype and device of ``query_embeds``. The gradient reaches it if it asks for one.
        document_ids: rows of ``table``, ``[B, S]``, int64, in ``[0, V)``; never read where ``document_mask`` is False.
        document_mask: which tokens are keys, ``[B, S]``, bool.
        query_index: the query of each pair, ``[B]``, int64 in ``[0, Q)``.
        w_q, w_k, w_v, w_o: ``[D, D]``, same dtype.
        b_q, b_k, b_v, b_o: ``[D]`` or None; b_k cancels, its gradient is 0.
        num_heads: H, a divisor of D.
        return_weights: also return `attention_weights` (plain PyTorch, for explanations).
    Returns: ``[B, T, D]``, dtype of ``query_embeds``. Zeros, and no gradient, where ``query_mask`` is False and for a
        document without tokens.
    Raises: ValueError for shapes and devices; TypeError for a dtype; IndexError for an id out of range (on CUDA the
        kernel traps).
    Source: Q-PEFT-A, Peng et al. 2024, https://arxiv.org/abs/2404.04522.
    """
    documents = (query_embeds, query_mask, table, document_ids, document_mask, query_index)
    weights, biases = (w_q, w_k, w_v, w_o), (b_q, b_k, b_v, b_o)
    check_clue_attention(*documents, *weights, *biases, num_heads)
    if uses_reference(table.device):
        result = reference(*documents, *weights, *biases, num_heads=num_heads)
    else:
        refuse_forward_mode("clue_attention", query_embeds, table, *weights, *biases)
        documents = (query_embeds, query_mask, with_plain_rows(table), document_ids, document_mask, query_index)
        result = torch.ops.qpeft_ext.clue_attention(*documents, *weights, *biases, num_heads)
    if return_weights:
        return result, attention_weights(*documents, w_q, w_k, b_q, b_k, num_heads=num_heads)
    return result


def check_clue_attention(
    query_embeds, query_mask, table, document_ids, document_mask, query_index,
    w_q, w_k, w_v, w_o, b_q, b_k, b_v, b_o, num_heads,
) -> None:  # fmt: skip
    op = "clue_attention"
    check_documents(op, query_embeds, query_mask, table, document_ids, document_mask, query_index)
    D = table.shape[1]
    if num_heads < 1 or D % num_heads:
        raise ValueError(f"{op}: num_heads must divide D = {D}, got {num_heads}")
    for name, weight in (("w_q", w_q), ("w_k", w_k), ("w_v", w_v), ("w_o", w_o)):
        expect_shape(op, name, weight, "[D, D]", (D, D))
        expect_like(op, name, weight, "table", table)
    for name, bias in (("b_q", b_q), ("b_k", b_k), ("b_v", b_v), ("b_o", b_o)):
        if bias is not None:
            expect_shape(op, name, bias, "[D]", (D,))
            expect_like(op, name, bias, "table", table)


def reference(
    query_embeds, query_mask, table, document_ids, document_mask, query_index,
    w_q, w_k, w_v, w_o, b_q=None, b_k=None, b_v=None, b_o=None, *, num_heads, return_weights=False,
):  # fmt: skip
    """The definition."""
    check_ids("clue_attention", "document_ids", document_ids, len(table), "V", document_mask)
    check_ids("clue_attention", "query_index", query_index, len(query_embeds), "Q")
    documents = (query_embeds, query_mask, table, document_ids, document_mask, query_index)
    weights = attention_weights(*documents, w_q, w_k, b_q, b_k, num_heads=num_heads)  # [B, H, T, S]
    values = _heads(linear(rows_of(table, document_ids, document_mask), w_v, b_v), num_heads)  # [B, H, S, D / H]
    mixed = linear((weights @ values).transpose(1, 2).flatten(2), w_o, b_o)  # [B, T, D]
    counts = query_mask[query_index] & document_mask.any(1, keepdim=True)
    mixed = mixed.masked_fill(~counts[:, :, None], 0)
    return (mixed, weights) if return_weights else mixed


def attention_weights(
    query_embeds, query_mask, table, document_ids, document_mask, query_index,
    w_q, w_k, b_q=None, b_k=None, *, num_heads,
) -> Tensor:  # fmt: skip
    """How much each query token looks at each document token, ``[B, H, T, S]``; over S 1, or 0 without tokens."""
    x = query_embeds.masked_fill(~query_mask[:, :, None], 0)[query_index]
    queries = _heads(linear(x, w_q, b_q), num_heads)  # [B, H, T, D / H]
    keys = _heads(linear(rows_of(table, document_ids, document_mask), w_k, b_k), num_heads)  # [B, H, S, D / H]
    scores = (queries @ keys.mT) * scale_of(queries)
    keep = document_mask[:, None, None, :]
    none = ~keep.any(-1, keepdim=True)  # a softmax over nothing would be NaN
    return scores.masked_fill(~(keep | none), -torch.inf).softmax(-1).masked_fill(none, 0)


def scale_of(queries: Tensor) -> float:
    """1 / sqrt of the width of a head, which may be 0."""
    return max(queries.shape[-1], 1) ** -0.5


def _heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # [B, H, length, D / H]


# ---- the operator, for both devices: primitives and what they promise are in csrc/ops.cpp ----------------------------
#
# With W_k moved to the query (a = W_k^T q) and W_v behind the sum, keys and values are the same table rows:
#   heads[h] = W_v[h] sum_s softmax_s(a_h . e_s) e_s + b_v
# A token's score depends only on its id, so scores are taken once per distinct id of all candidates of a query, and a
# document that repeats an id reads its row once.


@implement("clue_attention", "CompositeImplicitAutograd")
def _forward(
    query_embeds, query_mask, table, document_ids, document_mask, query_index,
    w_q, w_k, w_v, w_o, b_q, b_k, b_v, b_o, num_heads,
):  # fmt: skip
    """The projections by autograd of torch, around `clue_attention_heads`."""
    absorbed = absorb(query_embeds, query_mask, w_q, w_k, b_q, num_heads)
    documents = (table, document_ids, document_mask, query_index)
    # without a name nothing here holds the heads
    return project_heads(
        torch.ops.qpeft_ext.clue_attention_heads(absorbed, *documents, w_v)[0],
        query_mask, document_mask, query_index, w_o, b_k, b_v, b_o,
    )  # fmt: skip


def absorb(query_embeds, query_mask, w_q, w_k, b_q, num_heads) -> Tensor:
    """The queries in the space of the table's rows, with the scale: ``[Q, T, H, D]``."""
    x = query_embeds.masked_fill(~query_mask[:, :, None], 0)  # what stands there may be NaN
    queries = linear(x, w_q, b_q).flatten(0, 1).unflatten(1, (num_heads, -1)).transpose(0, 1)  # [H, Q * T, D / H]
    keys = w_k.unflatten(0, (num_heads, -1))  # [H, D / H, D]; a batch over Q too would copy it Q times
    absorbed = torch.bmm(queries * scale_of(queries), keys)
    return absorbed.transpose(0, 1).unflatten(0, x.shape[:2])


def project_heads(heads, query_mask, document_mask, query_index, w_o, b_k, b_v, b_o) -> Tensor:
    """``[B, T, D]`` concatenated heads to the result."""
    bias = b_o
    if b_v is not None:  # not moved behind W_o: the gradient of that is an outer product [D, D]
        heads = heads + b_v
    if b_k is not None:  # it cancels in the softmax; optimisers expect a gradient, and it is 0
        bias = 0 * b_k if bias is None else bias + 0 * b_k
    counts = query_mask[query_index] & document_mask.any(1, keepdim=True)
    return linear(heads, w_o, bias).masked_fill_(~counts[:, :, None], 0)


def _scores(pairs: Pairs, query: int, absorbed: Tensor) -> Tensor:
    """[U, R] of the distinct rows of a query, whose absorbed tokens are [R, D]."""
    scores = absorbed.new_empty(pairs.count_rows(query), pairs.R, dtype=pairs.dtype)
    for here, block in pairs.rows_of(query):
        torch.mm(block, absorbed.mT, out=scores[here])
    return scores


@implement("clue_attention_heads", "cpu")
def _heads_forward(absorbed, table, document_ids, document_mask, query_index, w_v):
    pairs = Pairs(table, document_ids, document_mask, query_index, *absorbed.shape[:3])
    T, H, D, dtype = pairs.T, pairs.H, pairs.D, pairs.dtype
    d, values = D // H, w_v.to(dtype)
    heads = table.new_empty(len(pairs.queries), T, D)
    lse = absorbed.new_empty(len(pairs.queries), pairs.R, dtype=dtype)
    contexts, buffer, scores, of_query = pairs.new_contexts(), [], None, -1
    for block in pairs.blocks():
        context = contexts[: block.stop - block.start]
        for query, part, n in pairs.parts(block):
            if query != of_query:
                scores, of_query = _scores(pairs, query, pairs.columns(absorbed, query)), query
            weights = pairs.weights(scores, lse, query, part, n)
            rows = pairs.gather(part, n, buffer)
            torch.bmm(weights.mT, rows, out=context[part.start - block.start : part.stop - block.start])
        P = len(context)
        context = context.view(P * T, H, D)
        for h in range(H):
            here = slice(h * d, (h + 1) * d)
            heads[block, :, here] = (context[:, h] @ values[here].T).view(P, T, d)
    return pairs.unsorted(heads), pairs.unsorted(lse).view(len(lse), T, H)


@fake("clue_attention_heads")
def _(absorbed, table, document_ids, document_mask, query_index, w_v):
    (_, T, H, D), B = absorbed.shape, document_ids.shape[0]
    return table.new_empty(B, T, D), table.new_empty(B, T, H, dtype=sum_dtype(table.dtype))


@implement("clue_attention_heads_backward", "cpu")
def _heads_backward(grad_heads, lse, absorbed, table, document_ids, document_mask, query_index, w_v, want_table):
    """Weights and contexts are computed again; gradients of scores are summed per distinct id, then one GEMM."""
    pairs = Pairs(table, document_ids, document_mask, query_index, *absorbed.shape[:3])
    H, D, dtype = pairs.H, pairs.D, pairs.dtype
    d, values = D // H, w_v.to(dtype)
    grad_heads, lse = pairs.sorted(grad_heads).to(dtype), pairs.sorted(lse).reshape(len(lse), pairs.R)
    grad_absorbed = absorbed.new_zeros(absorbed.shape[0], pairs.R, D, dtype=dtype)
    grad_w_v = torch.zeros_like(w_v, dtype=dtype)
    grad_table = torch.zeros_like(table, dtype=dtype) if want_table else table.new_empty(0)

    def finish(query: int, columns: Tensor, grad_scores: Tensor) -> None:
        begin = pairs.documents.offsets[query]
        for here, block in pairs.rows_of(query):
            grad_absorbed[query].addmm_(grad_scores[here].T, block)
            if want_table:
                rows = pairs.documents.rows[begin + here.start : begin + here.stop]
                grad_table.index_add_(0, rows, grad_scores[here] @ columns)

    contexts, grad_contexts, buffer = pairs.new_contexts(), pairs.new_contexts(), []
    columns, scores, grad_scores, of_query = None, None, None, -1
    for block in pairs.blocks():
        context, grad_context = (x[: block.stop - block.start] for x in (contexts, grad_contexts))
        P, rows = len(context), len(context) * pairs.T
        grads, grad_context = grad_heads[block].reshape(rows, D), grad_context.view(rows, H, D)
        for h in range(H):
            here = slice(h * d, (h + 1) * d)
            torch.mm(grads[:, here], values[here], out=grad_context[:, h])
        grad_context = grad_context.view(P, pairs.R, D)
        for query, part, n in pairs.parts(block):
            if query != of_query:
                if of_query >= 0:
                    finish(of_query, columns, grad_scores)
                columns, of_query = pairs.columns(absorbed, query), query
                scores = _scores(pairs, query, columns)
                grad_scores = torch.zeros_like(scores)
            inside = slice(part.start - block.start, part.stop - block.start)
            weights = pairs.weights(scores, lse, query, part, n, known=True)
            keys = pairs.gather(part, n, buffer)
            torch.bmm(weights.mT, keys, out=context[inside])
            grad_weights = keys @ grad_context[inside].mT  # [P, n, R]
            slots, _, first = pairs.slots(query, part, n)
            torch.ops.qpeft_ext.clue_attention_softmax_backward(weights, slots, grad_weights)
            order, offsets = shared_rows(slots - first, scores.shape[0])
            torch.ops.qpeft_ext.weighted_rows(grad_weights.flatten(0, 1), order, None, offsets, True, grad_scores)
            if want_table:
                ids = pairs.documents.ids[part, :n].reshape(-1)
                grad_rows = (weights @ grad_context[inside]).flatten(0, 1)
                grad_table.index_add_(0, ids.clamp_min(0), grad_rows)  # padding adds zeros
        context = context.view(rows, H, D)
        for h in range(H):
            here = slice(h * d, (h + 1) * d)
            grad_w_v[here].addmm_(grads[:, here].T, context[:, h])
    if of_query >= 0:
        finish(of_query, columns, grad_scores)
    return grad_absorbed.view(absorbed.shape).to(absorbed.dtype), grad_w_v.to(w_v.dtype), grad_table.to(table.dtype)


@fake("clue_attention_heads_backward")
def _(grad_heads, lse, absorbed, table, document_ids, document_mask, query_index, w_v, want_table):
    grad_table = torch.empty_like(table) if want_table else table.new_empty(0)
    return absorbed.new_empty(absorbed.shape), torch.empty_like(w_v), grad_table


def _setup_context(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *inputs)


def _autograd(ctx, grad_heads, _):
    want_table = ctx.needs_input_grad[1]
    grad_absorbed, grad_w_v, grad_table = torch.ops.qpeft_ext.clue_attention_heads_backward(
        grad_heads, *ctx.saved_tensors, want_table
    )
    return grad_absorbed, grad_table if want_table else None, None, None, None, grad_w_v


differentiable("clue_attention_heads", _setup_context, _autograd)
