"""Query-document pairs in the order of their queries, and the blocks in which attention works on them on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._checks import check_ids
from ._common import blocks_of_rows, distinct_rows, rows_per_block, sum_dtype

# 16 and 32 MB, 4 and 8 MB measure alike (48 documents, one thread)
CONTEXT_BYTES = 16 << 20  # contexts [P, T, H, D] of one block of pairs; one GEMM with each head of W_v follows
GATHER_BYTES = 4 << 20  # rows of documents gathered at a time inside a block


class Pairs:
    """B pairs, sorted by query (`sorted`, `unsorted` convert), with their distinct ids.

    Letters as in csrc/ops.cpp: R = T * H columns of scores, P pairs of a part, n the most distinct ids of one of them.
    """

    def __init__(
        self, table: Tensor, document_ids: Tensor, document_mask: Tensor, query_index: Tensor, Q: int, T: int, H: int
    ) -> None:
        check_ids("clue_attention", "document_ids", document_ids, table.shape[0], "V", document_mask)
        check_ids("clue_attention", "query_index", query_index, Q, "Q")
        self.table, self.T, self.H, self.R, self.D = table, T, H, T * H, table.shape[1]
        self.dtype = sum_dtype(table.dtype)
        ascending = (query_index[1:] >= query_index[:-1]).all()
        self.order = None if ascending else query_index.argsort(stable=True)
        self.queries: list[int] = self.sorted(query_index).tolist()
        documents = (self.sorted(x) for x in (document_ids, document_mask, query_index))
        self.documents = distinct_rows(*documents, Q, table.shape[0])

    def sorted(self, x: Tensor) -> Tensor:
        return x if self.order is None else x[self.order]

    def unsorted(self, x: Tensor) -> Tensor:
        return x if self.order is None else torch.empty_like(x).index_copy_(0, self.order, x)

    def columns(self, absorbed: Tensor, query: int) -> Tensor:
        """The absorbed tokens of a query, [R, D]: copied one query at a time, since [Q, T, H, D] has other strides."""
        return absorbed[query].to(self.dtype).reshape(self.R, self.D)

    def count_rows(self, query: int) -> int:
        return self.documents.offsets[query + 1] - self.documents.offsets[query]

    def distinct(self, query: int) -> Tensor:
        """The distinct ids of all candidates of a query, [U]."""
        return self.documents.rows[self.documents.offsets[query] : self.documents.offsets[query + 1]]

    def rows_of(self, query: int) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of their table rows: (where in `distinct`, [n, D])."""
        begin, end = self.documents.offsets[query], self.documents.offsets[query + 1]
        for here, block, _ in blocks_of_rows(self.table, self.documents.rows, begin, end):
            yield slice(here.start - begin, here.stop - begin), block

    def blocks(self) -> Iterator[slice]:
        """Blocks of pairs whose contexts fit in CONTEXT_BYTES."""
        B, size = len(self.queries), self._pairs_per_block()
        for first in range(0, B, size):
            yield slice(first, min(first + size, B))

    def new_contexts(self) -> Tensor:
        """A buffer [P, R, D] for the largest block."""
        P = min(self._pairs_per_block(), len(self.queries))
        return self.table.new_empty(P, self.R, self.D, dtype=self.dtype)

    def _pairs_per_block(self) -> int:
        bytes_per_pair = max(self.R * self.D * self.dtype.itemsize, 1)
        return max(1, CONTEXT_BYTES // bytes_per_pair)

    def parts(self, block: slice) -> Iterator[tuple[int, slice, int]]:
        """(query, pairs, n): a block, cut where the query changes and where the gathered rows would be too many."""
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

    def gather(self, pairs: slice, n: int, buffer: list[Tensor]) -> Tensor:
        """Rows of the distinct ids of some documents, [P, n, D], zeros behind the last; in a buffer that grows."""
        P = pairs.stop - pairs.start
        if not buffer or buffer[0].shape[0] < P * n:
            buffer[:] = [self.table.new_empty(P * n, self.D, dtype=self.dtype)]
        rows = buffer[0][: P * n]
        torch.ops.qpeft_ext.document_rows_gather(self.table, self.documents.ids[pairs, :n].reshape(-1), rows, None)
        return rows.view(P, n, self.D)

    def slots(self, query: int, pairs: slice, n: int) -> tuple[Tensor, Tensor, int]:
        """What the softmax primitives ask for: slots and counts [P, n], the slot of the query's first row."""
        slots, counts = (x[pairs, :n].contiguous() for x in (self.documents.slots, self.documents.counts))
        return slots, counts, self.documents.offsets[query]

    def weights(self, scores: Tensor, lse: Tensor, query: int, pairs: slice, n: int, known: bool = False) -> Tensor:
        """Weights [P, n, R] from the scores [U, R] of a query; lse [B, R] of these pairs is written unless known."""
        slots, counts, first = self.slots(query, pairs, n)
        if not known:
            torch.ops.qpeft_ext.clue_attention_lse(scores, slots, counts, first, lse[pairs])
        weights = scores.new_empty(*slots.shape, self.R)
        torch.ops.qpeft_ext.clue_attention_weights(scores, slots, counts, lse[pairs], first, weights)
        return weights


def shared_rows(slots: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """For each of ``rows`` rows, which places of ``slots`` (any shape, flattened) hold it: (order, offsets [rows + 1]).

    Places are ascending within a row, whatever the device: `weighted_rows` then has one order of its sums.
    """
    ascending, order = slots.flatten().sort(stable=True)
    return order, torch.searchsorted(ascending, torch.arange(rows + 1, dtype=slots.dtype, device=slots.device))
