"""Sort query-document pairs by query, and cut them into the blocks that attention on the CPU works on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._checks import check_ids
from ._common import blocks_of_rows, distinct_rows, rows_per_block, sum_dtype

# Twice as much of either is as fast (48 documents, one thread).
CONTEXT_BYTES = 16 << 20  # contexts [P, T, H, D] of one block of pairs; one GEMM with each head of W_v follows
GATHER_BYTES = 4 << 20  # rows of documents gathered at a time inside a block


class Pairs:
    """B query-document pairs, sorted by query, and the distinct token ids of their documents.

    `sorted` brings a tensor with one entry per pair into this order, `unsorted` takes it back. Letters as in
    csrc/ops.cpp: R = T * H columns of scores, P pairs of a part, n the largest number of distinct ids among them.
    """

    def __init__(
        self, table: Tensor, document_ids: Tensor, document_mask: Tensor, query_index: Tensor, Q: int, T: int, H: int
    ) -> None:
        check_ids("clue_attention", "document_ids", document_ids, table.shape[0], "V", document_mask)
        check_ids("clue_attention", "query_index", query_index, Q, "Q")
        self.table, self.T, self.H, self.R, self.D = table, T, H, T * H, table.shape[1]
        self.dtype = sum_dtype(table.dtype)
        ascending = bool((query_index[1:] >= query_index[:-1]).all())
        self.order = None if ascending else query_index.argsort(stable=True)
        self.queries: list[int] = self.sorted(query_index).tolist()
        ids, mask, group = (self.sorted(x) for x in (document_ids, document_mask, query_index))
        self.documents = distinct_rows(ids, mask, group, Q, table.shape[0])

    def sorted(self, x: Tensor) -> Tensor:
        return x if self.order is None else x[self.order]

    def unsorted(self, x: Tensor) -> Tensor:
        return x if self.order is None else torch.empty_like(x).index_copy_(0, self.order, x)

    def columns(self, absorbed: Tensor, query: int) -> Tensor:
        """Return the absorbed tokens of a query, [R, D]. Its strides make this a copy, so it is one query at a time."""
        return absorbed[query].to(self.dtype).reshape(self.R, self.D)

    def count_rows(self, query: int) -> int:
        return self.documents.offsets[query + 1] - self.documents.offsets[query]

    def distinct(self, query: int) -> Tensor:
        """Return the distinct ids of all candidates of a query, [U]."""
        return self.documents.rows[self.documents.offsets[query] : self.documents.offsets[query + 1]]

    def rows_of(self, query: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield the table rows of `distinct` in blocks: (their places in it, [n, D])."""
        begin, end = self.documents.offsets[query], self.documents.offsets[query + 1]
        for here, block, _ in blocks_of_rows(self.table, self.documents.rows, begin, end):
            yield slice(here.start - begin, here.stop - begin), block

    def blocks(self) -> Iterator[slice]:
        """Yield blocks of pairs whose contexts fit in CONTEXT_BYTES."""
        B, size = len(self.queries), self._pairs_per_block()
        for first in range(0, B, size):
            yield slice(first, min(first + size, B))

    def new_contexts(self) -> Tensor:
        """Return a buffer [P, R, D] for the contexts of the largest block."""
        P = min(self._pairs_per_block(), len(self.queries))
        return self.table.new_empty(P, self.R, self.D, dtype=self.dtype)

    def _pairs_per_block(self) -> int:
        bytes_per_pair = max(self.R * self.D * self.dtype.itemsize, 1)
        return max(1, CONTEXT_BYTES // bytes_per_pair)

    def parts(self, block: slice) -> Iterator[tuple[int, slice, int]]:
        """Cut a block where the query changes or the gathered rows would be too many; yield (query, pairs, n)."""
        most = rows_per_block(self.D, self.dtype, GATHER_BYTES)
        first = block.start
        while first < block.stop:
            query, n, last = self.queries[first], self.documents.lengths[first], first + 1
            while last < block.stop and self.queries[last] == query:
                longest = max(n, self.documents.lengths[last])
                if longest * (last + 1 - first) > most:
                    break
                n, last = longest, last + 1
            yield query, slice(first, last), n
            first = last

    def ids(self, pairs: slice, n: int) -> Tensor:
        """Return the distinct ids of some documents, [P, n]; -1 after the last of each."""
        return self.documents.ids[pairs, :n]

    def slots(self, query: int, pairs: slice, n: int) -> tuple[Tensor, Tensor, int]:
        """Return what the softmax primitives take: slots and counts [P, n], and the slot of the query's first row."""
        slots, counts = (x[pairs, :n].contiguous() for x in (self.documents.slots, self.documents.counts))
        return slots, counts, self.documents.offsets[query]

    def weights(self, scores: Tensor, lse: Tensor, query: int, pairs: slice, n: int, known: bool = False) -> Tensor:
        """Return the weights [P, n, R] of some pairs from the scores [U, R] of their query.

        ``lse`` [B, R]: log-sum-exp of the scores; the rows of these pairs are written first unless they are ``known``.
        """
        slots, counts, first = self.slots(query, pairs, n)
        if not known:
            torch.ops.qpeft_ext.clue_attention_lse(scores, slots, counts, first, lse[pairs])
        weights = scores.new_empty(*slots.shape, self.R)
        torch.ops.qpeft_ext.clue_attention_weights(scores, slots, counts, lse[pairs], first, weights)
        return weights


def gather(source: Tensor, rows: Tensor, buffer: list[Tensor]) -> Tensor:
    """Return rows [P, n] of ``source`` [N, D] in the dtype of sums, [P, n, D], with zeros where the row is -1.

    ``buffer``: an empty list at first; it keeps the memory of the result, which the next call writes again.
    """
    if not buffer or len(buffer[0]) < rows.numel():
        buffer[:] = [source.new_empty(rows.numel(), source.shape[1], dtype=sum_dtype(source.dtype))]
    block = buffer[0][: rows.numel()]
    torch.ops.qpeft_ext.document_rows_gather(source, rows.reshape(-1), block, None)
    return block.view(*rows.shape, source.shape[1])


def shared_rows(slots: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Group the places of ``slots`` (any shape, flattened) by the row that they name; negative ones name none.

    Returns: ``(order, offsets)``: the places of row r are ``order[offsets[r] : offsets[r + 1]]``, in ascending order on
        every device, so that `weighted_rows` always sums in the same order.
    """
    ascending, order = slots.flatten().sort(stable=True)
    return order, torch.searchsorted(ascending, torch.arange(rows + 1, dtype=slots.dtype, device=slots.device))
