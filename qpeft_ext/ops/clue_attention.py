"""Multi-head attention from the tokens of a query to the tokens of each of its documents."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..utils.torch_state import refuse_backward_in_autocast
from ._checks import check_documents, check_ids, expect_like, expect_shape
from ._common import (
    differentiable,
    fake,
    implement,
    outside_autocast,
    refuse_transforms,
    rows_of,
    sum_dtype,
    with_plain_rows,
)
from ._library import uses_reference


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
        return refuse_backward_in_autocast(reference(*documents, *weights, *biases, num_heads=num_heads))
    refuse_transforms("clue_attention", query_embeds, table, *weights, *biases)
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


@outside_autocast
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


# ---- the operator, for both devices: clue_attention_cpu.py and clue_attention_cuda.py have the middle of it ----------
#
# W_k can be applied to the query instead (a = W_k^T q), and W_v after the sum. Keys and values are then the same rows:
#   heads[h] = W_v[h] sum_s softmax_s(a_h . e_s) e_s + b_v
# The score of a token depends only on its id, so it is computed once for each distinct id of all candidates of a query,
# and a document that repeats an id reads its row once.


class _Rows(torch.autograd.Function):
    """`torch.nn.functional.linear` of a matrix, with gradients that `torch.autocast` does not round."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    @outside_autocast
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            grad @ weight if wants_x else None,
            grad.T @ x if wants_weight else None,
            grad.sum(0) if wants_bias else None,
        )


class _Products(torch.autograd.Function):
    """`torch.bmm`, likewise."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a, b)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @outside_autocast
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        wants_a, wants_b = ctx.needs_input_grad
        return grad @ b.mT if wants_a else None, a.mT @ grad if wants_b else None


@implement("clue_attention", "CompositeImplicitAutograd")
def _forward(
    query_embeds, query_mask, table, document_ids, document_mask, query_index,
    w_q, w_k, w_v, w_o, b_q, b_k, b_v, b_o, num_heads,
):  # fmt: skip
    """Apply the projections, which have gradients of their own, around `clue_attention_heads`."""
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
    queries = _Rows.apply(x.flatten(0, 1), w_q, b_q).unflatten(1, (num_heads, -1)).transpose(0, 1)  # [H, Q * T, D / H]
    keys = w_k.unflatten(0, (num_heads, -1))  # [H, D / H, D]; a batch over Q too would copy it Q times
    absorbed = _Products.apply(queries * scale_of(queries), keys)
    return absorbed.transpose(0, 1).unflatten(0, x.shape[:2])


def project_heads(heads, query_mask, document_mask, query_index, w_o, b_k, b_v, b_o) -> Tensor:
    """Turn concatenated heads ``[B, T, D]`` into the result of `clue_attention`."""
    bias = b_o
    if b_v is not None:  # added before W_o: after it, the gradient would take an outer product [D, D]
        heads = heads + b_v
    if b_k is not None:  # it cancels in the softmax, but optimisers expect a gradient, which is 0
        bias = 0 * b_k if bias is None else bias + 0 * b_k
    counts = query_mask[query_index] & document_mask.any(1, keepdim=True)
    result = _Rows.apply(heads.flatten(0, 1), w_o, bias).unflatten(0, heads.shape[:2])
    return result.masked_fill_(~counts[:, :, None], 0)


@fake("clue_attention_heads")
def _(absorbed, table, document_ids, document_mask, query_index, w_v):
    (_, T, H, D), B = absorbed.shape, document_ids.shape[0]
    return table.new_empty(B, T, D), table.new_empty(B, T, H, dtype=sum_dtype(table.dtype))


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
