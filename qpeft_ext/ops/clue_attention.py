"""Multi-head attention from the tokens of a query to the tokens of each of its documents."""

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
) -> Tensor:
    """Let the tokens of each query attend to the tokens of each of its documents, as multi-head attention does.

    This is ``torch.nn.MultiheadAttention`` without dropout; its queries are the query tokens, its keys and values are
    ``table[document_ids]``: q = x @ w_q.T + b_q; heads are consecutive slices of D; the scale is 1 / sqrt(D / H); the
    result is concat @ w_o.T + b_o. A row that occurs several times in a document is read once, and no keys or values
    of size ``[B, S, D]`` are stored.

    It runs on the CPU and on CUDA. Repeated calls on one device return the same bits, gradients included. float32 is
    not rounded to tf32 between the projections; the projections with w_q, w_k and w_o follow torch's setting (off by
    default). The gradient reaches every floating input that requires one; it cannot be differentiated again.

    Args:
        query_embeds: embeddings of the query tokens, ``[Q, T, D]``, float32, float64, bfloat16 or float16.
        query_mask: True where there is a query token, ``[Q, T]``, bool.
        table: embeddings, ``[V, D]``, dtype and device of ``query_embeds``.
        document_ids: rows of ``table``, ``[B, S]``, int64, in ``[0, V)``; never read where ``document_mask`` is False.
        document_mask: which document tokens are keys, ``[B, S]``, bool.
        query_index: the query of each pair, ``[B]``, int64 in ``[0, Q)``.
        w_q: weight of the query projection, ``[D, D]``, same dtype; also w_k, w_v and w_o.
        w_k: weight of the key projection.
        w_v: weight of the value projection.
        w_o: weight of the output projection.
        b_q: bias of the query projection, ``[D]``, same dtype, or None; also b_k, b_v and b_o.
        b_k: bias of the key projection; it cancels in the softmax, so its gradient is 0.
        b_v: bias of the value projection.
        b_o: bias of the output projection.
        num_heads: H, a divisor of D.
    Returns: one vector for each query token of each pair, ``[B, T, D]``, dtype of ``query_embeds``. It is zero, and has
        no gradient, where ``query_mask`` is False and for a document without tokens.
    Raises:
        ValueError: if shapes or devices disagree, or H does not divide D.
        TypeError: if a dtype is wrong.
        IndexError: if an id is out of range. On CUDA the kernel stops with an error instead.
    Source: Q-PEFT-A, Peng et al. 2024, https://arxiv.org/abs/2404.04522.

    Example: one query of two tokens and two documents; with weights of 0 and 1 each document gives its mean row::

        >>> import torch
        >>> from qpeft_ext.ops import clue_attention
        >>> table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [4.0, 4.0]])
        >>> zero, one = torch.zeros(2, 2), torch.eye(2)
        >>> clue_attention(
        ...     query_embeds=table[None, :2], query_mask=torch.tensor([[True, True]]),
        ...     table=table, document_ids=torch.tensor([[0, 1], [2, -1]]),
        ...     document_mask=torch.tensor([[True, True], [True, False]]), query_index=torch.tensor([0, 0]),
        ...     w_q=zero, w_k=one, w_v=one, w_o=one, num_heads=1,
        ... )
        tensor([[[0.5000, 0.5000],
                 [0.5000, 0.5000]],
        <BLANKLINE>
                [[4.0000, 4.0000],
                 [4.0000, 4.0000]]])
    """
    documents = (query_embeds, query_mask, table, document_ids, document_mask, query_index)
    weights, biases = (w_q, w_k, w_v, w_o), (b_q, b_k, b_v, b_o)
    check_clue_attention(*documents, *weights, *biases, num_heads)
    if uses_reference(table.device):
        return reference(*documents, *weights, *biases, num_heads=num_heads)
    refuse_forward_mode("clue_attention", query_embeds, table, *weights, *biases)
    documents = (query_embeds, query_mask, with_plain_rows(table), document_ids, document_mask, query_index)
    return torch.ops.qpeft_ext.clue_attention(*documents, *weights, *biases, num_heads)


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
    w_q, w_k, w_v, w_o, b_q=None, b_k=None, b_v=None, b_o=None, *, num_heads,
) -> Tensor:  # fmt: skip
    """Compute `clue_attention` by its definition, in plain PyTorch."""
    check_ids("clue_attention", "document_ids", document_ids, len(table), "V", document_mask)
    check_ids("clue_attention", "query_index", query_index, len(query_embeds), "Q")
    documents = (query_embeds, query_mask, table, document_ids, document_mask, query_index)
    weights = attention_weights(*documents, w_q, w_k, b_q, b_k, num_heads=num_heads)  # [B, H, T, S]
    values = _heads(linear(rows_of(table, document_ids, document_mask), w_v, b_v), num_heads)  # [B, H, S, D / H]
    mixed = linear((weights @ values).transpose(1, 2).flatten(2), w_o, b_o)  # [B, T, D]
    counts = query_mask[query_index] & document_mask.any(1, keepdim=True)
    return mixed.masked_fill(~counts[:, :, None], 0)


def attention_weights(
    query_embeds, query_mask, table, document_ids, document_mask, query_index,
    w_q, w_k, b_q=None, b_k=None, *, num_heads,
) -> Tensor:  # fmt: skip
    """Return how much each query token attends to each document token in `clue_attention`, to explain a score.

    This is plain PyTorch. The projections of values and output do not matter for it.

    Args:
        query_embeds: embeddings of the query tokens, ``[Q, T, D]``, floating.
        query_mask: True where there is a query token, ``[Q, T]``, bool.
        table: embeddings, ``[V, D]``, dtype and device of ``query_embeds``.
        document_ids: rows of ``table``, ``[B, S]``, int64, in ``[0, V)``; never read where ``document_mask`` is False.
        document_mask: which document tokens are keys, ``[B, S]``, bool.
        query_index: the query of each pair, ``[B]``, int64 in ``[0, Q)``.
        w_q: weight of the query projection, ``[D, D]``, same dtype.
        w_k: weight of the key projection, likewise.
        b_q: bias of the query projection, ``[D]``, same dtype, or None.
        b_k: bias of the key projection, likewise.
        num_heads: H, a divisor of D.
    Returns: ``[B, H, T, S]``, dtype of ``query_embeds``; they sum to 1 over S, or are all 0 for a document without
        tokens.
    """
    x = query_embeds.masked_fill(~query_mask[:, :, None], 0)[query_index]
    queries = _heads(linear(x, w_q, b_q), num_heads)  # [B, H, T, D / H]
    keys = _heads(linear(rows_of(table, document_ids, document_mask), w_k, b_k), num_heads)  # [B, H, S, D / H]
    scores = (queries @ keys.mT) * scale_of(queries)
    keep = document_mask[:, None, None, :]
    none = ~keep.any(-1, keepdim=True)  # a softmax over nothing would be NaN
    return scores.masked_fill(~(keep | none), -torch.inf).softmax(-1).masked_fill(none, 0)


def scale_of(queries: Tensor) -> float:
    """Return 1 / sqrt of the width of a head, which may be 0."""
    return max(queries.shape[-1], 1) ** -0.5


def _heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # [B, H, length, D / H]


# ---- the operator, for both devices: primitives and what they promise are in csrc/ops.cpp ----------------------------
#
# W_k can be applied to the query instead (a = W_k^T q), and W_v after the sum. Keys and values are then the same rows:
#   heads[h] = W_v[h] sum_s softmax_s(a_h . e_s) e_s + b_v
# The score of a token depends only on its id, so it is computed once for each distinct id of all candidates of a query,
# and a document that repeats an id reads its row once.


@implement("clue_attention", "CompositeImplicitAutograd")
def _forward(
    query_embeds, query_mask, table, document_ids, document_mask, query_index,
    w_q, w_k, w_v, w_o, b_q, b_k, b_v, b_o, num_heads,
):  # fmt: skip
    """Apply the projections, which torch's autograd differentiates, around `clue_attention_heads`."""
    absorbed = absorb(query_embeds, query_mask, w_q, w_k, b_q, num_heads)
    documents = (table, document_ids, document_mask, query_index)
    # The heads get no name here, so that their memory is free as soon as they are projected.
    return project_heads(
        torch.ops.qpeft_ext.clue_attention_heads(absorbed, *documents, w_v)[0],
        query_mask, document_mask, query_index, w_o, b_k, b_v, b_o,
    )  # fmt: skip


def absorb(query_embeds, query_mask, w_q, w_k, b_q, num_heads) -> Tensor:
    """Project the queries into the space of the table's rows and scale them: ``[Q, T, H, D]``."""
    x = query_embeds.masked_fill(~query_mask[:, :, None], 0)  # masked tokens may be NaN
    queries = linear(x, w_q, b_q).flatten(0, 1).unflatten(1, (num_heads, -1)).transpose(0, 1)  # [H, Q * T, D / H]
    keys = w_k.unflatten(0, (num_heads, -1))  # [H, D / H, D]; a batch over Q too would copy it Q times
    absorbed = torch.bmm(queries * scale_of(queries), keys)
    return absorbed.transpose(0, 1).unflatten(0, x.shape[:2])


def project_heads(heads, query_mask, document_mask, query_index, w_o, b_k, b_v, b_o) -> Tensor:
    """Turn concatenated heads ``[B, T, D]`` into the result of `clue_attention`."""
    bias = b_o
    if b_v is not None:  # added before W_o: after it, the gradient would take an outer product [D, D]
        heads = heads + b_v
    if b_k is not None:  # it cancels in the softmax, but optimisers expect a gradient, which is 0
        bias = 0 * b_k if bias is None else bias + 0 * b_k
    counts = query_mask[query_index] & document_mask.any(1, keepdim=True)
    return linear(heads, w_o, bias).masked_fill_(~counts[:, :, None], 0)


def _scores(pairs: Pairs, query: int, absorbed: Tensor) -> Tensor:
    """Return the scores [U, R] of the distinct rows of a query, whose absorbed tokens are [R, D]."""
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
    contexts, buffer = pairs.new_contexts(), list[Tensor]()
    scores, of_query = lse.new_empty(0), -1
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


class _QueryGradients:
    """Scores of one query and their gradients, which are summed over its pairs and then passed on by `finish`."""

    def __init__(self, pairs: Pairs, absorbed: Tensor, query: int) -> None:
        self.pairs, self.query = pairs, query
        self.columns = pairs.columns(absorbed, query)
        self.scores = _scores(pairs, query, self.columns)
        self.grad_scores = torch.zeros_like(self.scores)

    def finish(self, grad_absorbed: Tensor, grad_table: Tensor | None) -> None:
        """Add the gradients of the query's absorbed tokens and of the table rows that they met."""
        begin = self.pairs.documents.offsets[self.query]
        for here, block in self.pairs.rows_of(self.query):
            grad_absorbed[self.query].addmm_(self.grad_scores[here].T, block)
            if grad_table is not None:
                rows = self.pairs.documents.rows[begin + here.start : begin + here.stop]
                grad_table.index_add_(0, rows, self.grad_scores[here] @ self.columns)


@implement("clue_attention_heads_backward", "cpu")
def _heads_backward(grad_heads, lse, absorbed, table, document_ids, document_mask, query_index, w_v, want_table):
    """Compute weights and contexts again; sum the gradients of scores per distinct id, then multiply once."""
    pairs = Pairs(table, document_ids, document_mask, query_index, *absorbed.shape[:3])
    H, D, dtype = pairs.H, pairs.D, pairs.dtype
    d, values = D // H, w_v.to(dtype)
    grad_heads, lse = pairs.sorted(grad_heads).to(dtype), pairs.sorted(lse).reshape(len(lse), pairs.R)
    grad_absorbed = absorbed.new_zeros(absorbed.shape[0], pairs.R, D, dtype=dtype)
    grad_w_v = torch.zeros_like(w_v, dtype=dtype)
    grad_table = torch.zeros_like(table, dtype=dtype) if want_table else None
    contexts, grad_contexts, buffer = pairs.new_contexts(), pairs.new_contexts(), list[Tensor]()
    current: _QueryGradients | None = None
    for block in pairs.blocks():
        context, grad_context = (x[: block.stop - block.start] for x in (contexts, grad_contexts))
        P, rows = len(context), len(context) * pairs.T
        grads, grad_context = grad_heads[block].reshape(rows, D), grad_context.view(rows, H, D)
        for h in range(H):
            here = slice(h * d, (h + 1) * d)
            torch.mm(grads[:, here], values[here], out=grad_context[:, h])
        grad_context = grad_context.view(P, pairs.R, D)
        for query, part, n in pairs.parts(block):
            if current is None or query != current.query:
                if current is not None:
                    current.finish(grad_absorbed, grad_table)
                current = _QueryGradients(pairs, absorbed, query)
            inside = slice(part.start - block.start, part.stop - block.start)
            weights = pairs.weights(current.scores, lse, query, part, n, known=True)
            keys = pairs.gather(part, n, buffer)
            torch.bmm(weights.mT, keys, out=context[inside])
            grad_weights = keys @ grad_context[inside].mT  # [P, n, R]
            slots, _, first = pairs.slots(query, part, n)
            torch.ops.qpeft_ext.clue_attention_softmax_backward(weights, slots, grad_weights)
            order, offsets = shared_rows(slots - first, current.scores.shape[0])
            torch.ops.qpeft_ext.weighted_rows(
                grad_weights.flatten(0, 1), order, None, offsets, True, current.grad_scores
            )
            if grad_table is not None:
                ids = pairs.documents.ids[part, :n].reshape(-1)
                grad_rows = (weights @ grad_context[inside]).flatten(0, 1)
                grad_table.index_add_(0, ids.clamp_min(0), grad_rows)  # padding adds zeros
        context = context.view(rows, H, D)
        for h in range(H):
            here = slice(h * d, (h + 1) * d)
            grad_w_v[here].addmm_(grads[:, here].T, context[:, h])
    if current is not None:
        current.finish(grad_absorbed, grad_table)
    grad_absorbed = grad_absorbed.view(absorbed.shape).to(absorbed.dtype)
    return (
        grad_absorbed,
        grad_w_v.to(w_v.dtype),
        table.new_empty(0) if grad_table is None else grad_table.to(table.dtype),
    )


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
