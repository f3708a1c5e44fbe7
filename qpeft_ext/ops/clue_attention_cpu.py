"""Compute the heads of `clue_attention` on the CPU: pairs go query by query through the primitives of csrc/ops.cpp.

Blocks are small enough for their rows and contexts to stay in the caches, where the GEMMs of torch find them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import implement
from ._pairs import Pairs, gather, shared_rows


def _scores(pairs: Pairs, query: int, absorbed: Tensor) -> Tensor:
    """Return the scores [U, R] of the distinct rows of a query, whose absorbed tokens are [R, D]."""
    scores = absorbed.new_empty(pairs.count_rows(query), pairs.R, dtype=pairs.dtype)
    for here, block in pairs.rows_of(query):
        torch.mm(block, absorbed.mT, out=scores[here])
    return scores


@implement("clue_attention_heads", "cpu")
def forward(absorbed, table, document_ids, document_mask, query_index, w_v):
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
            rows = gather(table, pairs.ids(part, n), buffer)
            torch.bmm(weights.mT, rows, out=context[part.start - block.start : part.stop - block.start])
        P = len(context)
        context = context.view(P * T, H, D)
        for h in range(H):
            here = slice(h * d, (h + 1) * d)
            heads[block, :, here] = (context[:, h] @ values[here].T).view(P, T, d)
    return pairs.unsorted(heads), pairs.unsorted(lse).view(len(lse), T, H)


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
def backward(grad_heads, lse, absorbed, table, document_ids, document_mask, query_index, w_v, want_table):
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
            keys = gather(table, pairs.ids(part, n), buffer)
            torch.bmm(weights.mT, keys, out=context[inside])
            grad_weights = keys @ grad_context[inside].mT  # [P, n, R]
            slots, _, first = pairs.slots(query, part, n)
            torch.ops.qpeft_ext.clue_attention_softmax_backward(weights, slots, grad_weights)
            order, offsets = shared_rows(slots - first, current.scores.shape[0])
            torch.ops.qpeft_ext.weighted_rows(
                grad_weights.flatten(0, 1), order, None, offsets, True, current.grad_scores
            )
            if grad_table is not None:
                ids = pairs.ids(part, n).reshape(-1)
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
