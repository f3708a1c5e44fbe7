"""Compute the heads of `clue_attention` on CUDA: blocks of pairs go through the primitives of csrc/ops.cpp.

Nothing here waits for the GPU, so that it can be captured in a graph: sizes are upper bounds that follow from shapes,
and what depends on ids stays on the device. Pairs keep their order, since sorting them by query would copy the heads;
the pairs of a query within one block share its scores. There are two passes over the rows: scores for each distinct id
of a query in the block, then contexts for each pair. In the second pass the rows come out of the L2 cache, and a single
kernel for both would compute the scores again for each pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ._common import add_product, exact_float32, implement, multiply, sum_dtype
from ._pairs import shared_rows

SCORE_BYTES = 64 << 20  # scores and weights of a block of pairs
CONTEXT_BYTES = 32 << 20  # contexts [pairs, R, D] of a part of a block, in L2 for the GEMM with W_v that follows
ROW_BYTES = 64 << 20  # gradients of table rows


class ScoredPairs(NamedTuple):
    """Pairs whose scores are in memory at the same time. Letters as in csrc/ops.cpp; padding follows distinct ids."""

    pairs: slice
    rows: Tensor  # [U] int64: distinct ids, query after query; U is an upper bound, rows[offsets[-1]:] is not written
    offsets: Tensor  # [Q + 1] int64
    ids: Tensor  # [P, S] int64
    slots: Tensor  # [P, S] int32
    counts: Tensor  # [P, S] int32
    lengths: Tensor  # [P] int64

    def within(self, part: slice) -> slice:
        """Return the same pairs, counted from the first pair of the block."""
        return slice(part.start - self.pairs.start, part.stop - self.pairs.start)

    def weighted_sums(self, table: Tensor, part: slice, weights: Tensor, out: Tensor, heads: int = 1) -> Tensor:
        """Return the contexts of some of its pairs, in ``out``, which has room for as many or more."""
        here, out = self.within(part), out[: part.stop - part.start]
        rows, lengths, weights = self.ids[here].flatten(), self.lengths[here], weights[here].flatten(0, 1)
        torch.ops.qpeft_ext.clue_attention_weighted_sums(table, rows, None, lengths, weights, heads, False, out)
        return out

    def products(self, table: Tensor, part: slice, dense: Tensor, out: Tensor) -> None:
        """Multiply the rows of some of its pairs with ``dense`` [pairs, R, D], into ``out`` [P, S, R] of the block."""
        here = self.within(part)
        rows, lengths = self.ids[here].flatten(), self.lengths[here]
        torch.ops.qpeft_ext.clue_attention_products(table, rows, None, lengths, dense, out[here].flatten(0, 1))


def blocks_of_pairs(V: int, documents: tuple[Tensor, Tensor, Tensor], Q: int, pair_bytes: int) -> Iterator[ScoredPairs]:
    """Cut pairs into blocks; ``documents``: ids [B, S], mask, query_index; ``pair_bytes``: bytes of a pair's scores."""
    for pairs in ranges(slice(0, len(documents[0])), SCORE_BYTES // max(pair_bytes, 1)):
        here = (x[pairs].contiguous() for x in documents)
        rows, offsets, ids, slots, counts, lengths = torch.ops.qpeft_ext.document_rows_distinct(*here, Q, V)
        yield ScoredPairs(pairs, rows, offsets, ids, slots, counts, lengths)


def ranges(whole: slice, size: int) -> Iterator[slice]:
    size = max(size, 1)
    for first in range(whole.start, whole.stop, size):
        yield slice(first, min(first + size, whole.stop))


def weights_of(table: Tensor, columns: Tensor, block: ScoredPairs, lse: Tensor, known: bool = False) -> Tensor:
    """Return the weights [P, S, R] of a block, in the dtype of the table.

    ``lse`` [B, R]: log-sum-exp of the scores; the rows of these pairs are written first unless they are ``known``.
    """
    scores = table.new_empty(block.rows.shape[0], columns.shape[1], dtype=sum_dtype(table.dtype))
    torch.ops.qpeft_ext.clue_attention_products(table, block.rows, block.offsets, None, columns, scores)
    documents = (scores, block.slots, block.counts)
    if not known:
        torch.ops.qpeft_ext.clue_attention_lse(*documents, 0, lse[block.pairs])
    weights = table.new_empty(*block.ids.shape, columns.shape[1])
    torch.ops.qpeft_ext.clue_attention_weights(*documents, lse[block.pairs], 0, weights)
    return weights


def tokens_at_once(T: int, pair_bytes: int, context_bytes: int = 0) -> int:
    """Return how many query tokens fit in the budgets: all T, or fewer where a single pair is too large."""
    return max(1, min(T, T * SCORE_BYTES // max(pair_bytes, 1), T * CONTEXT_BYTES // max(context_bytes, 1)))


class _Sizes:
    """Sizes of one call (letters as in csrc/ops.cpp), and how many bytes of the budgets a pair takes."""

    def __init__(self, absorbed: Tensor, table: Tensor, document_ids: Tensor, backward: bool = False) -> None:
        (self.Q, self.T, self.H, self.D), (self.B, S) = absorbed.shape, document_ids.shape
        self.R, self.d = self.T * self.H, self.D // self.H
        wide, narrow = sum_dtype(table.dtype).itemsize, table.dtype.itemsize
        # bytes of one score: itself and its weight, and in the backward pass the gradients of both
        self.pair_bytes = S * self.R * (2 * wide + 2 * narrow if backward else wide + narrow)
        context_bytes = max(self.R * self.D * narrow, 1)
        self.pairs = max(1, CONTEXT_BYTES // context_bytes)  # of a part
        self.tokens = tokens_at_once(self.T, self.pair_bytes, context_bytes)

    def new_contexts(self, table: Tensor) -> Tensor:
        """Return a buffer [pairs, R, D] for the contexts of the largest part."""
        return table.new_empty(min(self.pairs, self.B), self.R, self.D)

    def by_head(self, x: Tensor, width: int) -> Tensor:
        """View contexts (width D) or heads (width D / H) of some pairs as a batch over heads, [H, P * T, width]."""
        return x.view(len(x) * self.T, self.H, width).transpose(0, 1)


@implement("clue_attention_heads", "cuda")
def forward(absorbed, table, document_ids, document_mask, query_index, w_v):
    sizes = _Sizes(absorbed, table, document_ids)
    documents = (document_ids, document_mask, query_index)
    if sizes.tokens < sizes.T:
        pieces = [forward(x, table, *documents, w_v) for x in absorbed.split(sizes.tokens, dim=1)]
        return tuple(torch.cat(x, dim=1) for x in zip(*pieces, strict=True))
    columns = absorbed.reshape(sizes.Q, sizes.R, sizes.D).contiguous()
    values = w_v.unflatten(0, (sizes.H, sizes.d)).mT
    heads = table.new_empty(sizes.B, sizes.T, sizes.D)
    lse = table.new_empty(sizes.B, sizes.R, dtype=sum_dtype(table.dtype))
    contexts = sizes.new_contexts(table)
    with exact_float32(table):
        for block in blocks_of_pairs(table.shape[0], documents, sizes.Q, sizes.pair_bytes):
            weights = weights_of(table, columns, block, lse)
            for part in ranges(block.pairs, sizes.pairs):
                context = block.weighted_sums(table, part, weights, contexts)
                torch.bmm(sizes.by_head(context, sizes.D), values, out=sizes.by_head(heads[part], sizes.d))
            del weights  # before those of the next block
    return heads, lse.view(sizes.B, sizes.T, sizes.H)


@implement("clue_attention_heads_backward", "cuda")
def backward(grad_heads, lse, absorbed, table, document_ids, document_mask, query_index, w_v, want_table):
    """Compute weights and contexts again; sum the gradients of scores per distinct id, then multiply with its row."""
    sizes = _Sizes(absorbed, table, document_ids, backward=True)
    documents, T = (document_ids, document_mask, query_index), sizes.tokens
    if T < sizes.T:
        pieces = zip(*(x.split(T, dim=1) for x in (grad_heads, lse, absorbed)), strict=True)
        results = [backward(*piece, table, *documents, w_v, want_table) for piece in pieces]
        of_absorbed, of_w_v, of_table = zip(*results, strict=True)
        return torch.cat(of_absorbed, dim=1), sum(of_w_v), sum(of_table)
    H, R, D, dtype = sizes.H, sizes.R, sizes.D, sum_dtype(table.dtype)
    columns, lse = absorbed.reshape(sizes.Q, R, D).contiguous(), lse.reshape(sizes.B, R).contiguous()
    values = w_v.unflatten(0, (H, sizes.d))
    grad_heads = grad_heads.contiguous()
    grad_columns = torch.zeros_like(columns, dtype=dtype)
    grad_w_v = torch.zeros_like(values, dtype=dtype)
    grad_table = torch.zeros_like(table, dtype=dtype) if want_table else table.new_empty(0)
    contexts, grad_contexts = sizes.new_contexts(table), sizes.new_contexts(table)

    def run(block: ScoredPairs) -> None:
        weights = weights_of(table, columns, block, lse, known=True)
        grad_weights = torch.empty_like(weights, dtype=dtype)
        for part in ranges(block.pairs, sizes.pairs):
            context = sizes.by_head(block.weighted_sums(table, part, weights, contexts), D)
            grad_context, grads = grad_contexts[: part.stop - part.start], sizes.by_head(grad_heads[part], sizes.d)
            torch.bmm(grads, values, out=sizes.by_head(grad_context, D))
            block.products(table, part, grad_context, grad_weights)
            add_product(grad_w_v, grads.mT, context)
            if want_table:
                _add_rows(grad_table, block.ids[block.within(part)], weights[block.within(part)], grad_context)
        torch.ops.qpeft_ext.clue_attention_softmax_backward(weights, block.slots, grad_weights)
        grad_scores = grad_weights.new_empty(block.rows.shape[0], R)
        order, offsets = shared_rows(block.slots, len(grad_scores))
        torch.ops.qpeft_ext.weighted_rows(grad_weights.flatten(0, 1), order, None, offsets, False, grad_scores)
        torch.ops.qpeft_ext.clue_attention_weighted_sums(
            table, block.rows, block.offsets, None, grad_scores.to(table.dtype), 1, True, grad_columns
        )
        if want_table:
            for part in ranges(block.pairs, sizes.pairs):
                of_scores = grad_weights[block.within(part)].to(table.dtype)
                _add_rows(grad_table, block.ids[block.within(part)], of_scores, columns[query_index[part]])

    with exact_float32(table):
        for block in blocks_of_pairs(table.shape[0], documents, sizes.Q, sizes.pair_bytes):
            run(block)
    grad_absorbed = grad_columns.view(absorbed.shape).to(absorbed.dtype)
    return grad_absorbed, grad_w_v.flatten(0, 1).to(w_v.dtype), grad_table.to(table.dtype)


def _add_rows(grad_table: Tensor, ids: Tensor, weights: Tensor, columns: Tensor) -> None:
    """Add weights[p, j] @ columns[p] to grad_table[ids[p, j]], in a fixed order; weights are 0 where ids are -1."""
    P, D = len(ids), grad_table.shape[1]
    for places in ranges(slice(0, ids.shape[1]), ROW_BYTES // max(P * D * grad_table.dtype.itemsize, 1)):
        rows = multiply(weights[:, places], columns).flatten(0, 1)
        order, offsets = shared_rows(ids[:, places], len(grad_table))
        torch.ops.qpeft_ext.weighted_rows(rows, order, None, offsets, True, grad_table)


def projected_heads(queries, keys, values, document_ids, document_mask, query_index) -> Tensor:
    """Return heads [B, T, D] from projected rows: queries [Q, H, T, D / H] with their scale, keys and values [V, D].

    A head of a query only sees its own slice of the keys: the other slices of its column are 0. That costs as much as
    the scores of `clue_attention`. Values are summed slice by slice.
    """
    Q, H, T, d = queries.shape
    (B, S), (V, D), dtype = document_ids.shape, keys.shape, sum_dtype(keys.dtype)
    pair_bytes = S * T * H * (dtype.itemsize + keys.dtype.itemsize)
    tokens = tokens_at_once(T, pair_bytes)
    documents = (document_ids, document_mask, query_index)
    if tokens < T:
        return torch.cat([projected_heads(x, keys, values, *documents) for x in queries.split(tokens, dim=2)], dim=1)
    columns = queries.new_zeros(Q, H, T, H, d)
    columns.diagonal(dim1=1, dim2=3).copy_(queries.permute(0, 2, 3, 1))
    heads, lse = keys.new_empty(B, T, D), keys.new_empty(B, H * T, dtype=dtype)
    for block in blocks_of_pairs(V, documents, Q, pair_bytes):
        weights = weights_of(keys, columns.view(Q, H * T, D), block, lse)
        block.weighted_sums(values, block.pairs, weights, heads[block.pairs], heads=H)
        del weights  # before those of the next block
    return heads
