"""`clue_attention` with fixed weights, for which each row of the table is projected once and then reused."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from ._common import exact_float32, outside_autocast, refuse_transforms, sum_dtype
from ._library import uses_reference
from ._pairs import Pairs, gather
from .clue_attention import _heads, check_clue_attention, clue_attention, project_heads, scale_of
from .clue_attention_cuda import projected_heads


class ProjectedTable:
    """Keys and values (``table @ w_k.T``, ``table @ w_v.T``) of the ids seen so far, within a byte budget.

    Its `attend` computes `clue_attention` without gradient. A row costs 2 D^2 multiply-adds once; afterwards a pair
    costs 2 T S D and the output projection. On the CPU rows are projected when an id first occurs. When the store is
    full it starts again from empty; a call with a query that has more distinct ids than fit uses `clue_attention`.

    On CUDA nothing waits for the GPU, so it is not known which rows are missing: the first call projects the whole
    table (2 V D^2 multiply-adds, 2.1 TFLOP for Llama-2-7B) if it fits in the budget; otherwise all calls use
    `clue_attention`. float16 and bfloat16 rows are stored in that dtype on CUDA, and as float32 on the CPU.

    Args:
        table: embeddings, ``[V, D]``, floating.
        w_k: weight of the key projection, ``[D, D]``, dtype and device of ``table``.
        w_v: weight of the value projection, likewise.
        b_k: bias of the key projection; it cancels in the softmax, so it is not used.
        b_v: bias of the value projection, ``[D]`` or None.
        budget_bytes: memory for the store, allocated at once and never exceeded; ``used_bytes`` of it are in use.

    Example::

        >>> import torch
        >>> from qpeft_ext.ops import ProjectedTable
        >>> table, one = torch.eye(2), torch.eye(2)
        >>> projected = ProjectedTable(table, w_k=one, w_v=2 * one, budget_bytes=1 << 20)
        >>> projected.attend(
        ...     query_embeds=table[None, :1], query_mask=torch.tensor([[True]]),
        ...     document_ids=torch.tensor([[1]]), document_mask=torch.tensor([[True]]), query_index=torch.tensor([0]),
        ...     w_q=one, w_o=one, num_heads=1,
        ... )
        tensor([[[0., 2.]]])
    """

    def __init__(
        self,
        table: Tensor,
        w_k: Tensor,
        w_v: Tensor,
        b_k: Tensor | None = None,
        b_v: Tensor | None = None,
        *,
        budget_bytes: int,
    ) -> None:
        V, D = table.shape
        self.table, self.w_k, self.w_v = table.detach(), w_k.detach(), w_v.detach()
        self.b_v = None if b_v is None else b_v.detach()
        self.all_at_once = table.device.type == "cuda"
        self.dtype = table.dtype if self.all_at_once else sum_dtype(table.dtype)
        self.row_bytes = 2 * D * self.dtype.itemsize
        self.capacity = min(max(budget_bytes, 0) // max(self.row_bytes, 1), V)
        if self.all_at_once and self.capacity < V:
            self.capacity = 0
        self.keys, self.values = (table.new_empty(self.capacity, D, dtype=self.dtype) for _ in range(2))
        self.place = torch.full((V,), -1, dtype=torch.int64, device=table.device)  # row of each id in the store, or -1
        self.used = 0

    @property
    def used_bytes(self) -> int:
        """Return the bytes of the rows in the store."""
        return self.used * self.row_bytes

    def clear(self) -> None:
        """Forget the rows that calls have brought in; a table that was projected as a whole stays."""
        if not self.all_at_once:
            self.place.fill_(-1)
            self.used = 0

    @outside_autocast
    @torch.no_grad()
    def attend(
        self,
        query_embeds: Tensor,
        query_mask: Tensor,
        document_ids: Tensor,
        document_mask: Tensor,
        query_index: Tensor,
        w_q: Tensor,
        w_o: Tensor,
        b_q: Tensor | None = None,
        b_o: Tensor | None = None,
        *,
        num_heads: int,
    ) -> Tensor:
        """Return the result of `clue_attention` for these queries and documents, without gradient.

        The inputs are those of `clue_attention`; the table and the projections of keys and values are this object's.

        Args:
            query_embeds: embeddings of the query tokens, ``[Q, T, D]``, floating.
            query_mask: True where there is a query token, ``[Q, T]``, bool.
            document_ids: rows of the table, ``[B, S]``, int64, in ``[0, V)``; unread where ``document_mask`` is False.
            document_mask: which document tokens are keys, ``[B, S]``, bool.
            query_index: the query of each pair, ``[B]``, int64 in ``[0, Q)``.
            w_q: weight of the query projection, ``[D, D]``, same dtype.
            w_o: weight of the output projection, likewise.
            b_q: bias of the query projection, ``[D]``, same dtype, or None.
            b_o: bias of the output projection, likewise.
            num_heads: H, a divisor of D.
        Returns: ``[B, T, D]``, dtype of ``query_embeds``.
        Raises: as `clue_attention`.
        """
        weights = (w_q, self.w_k, self.w_v, w_o, b_q, None, self.b_v, b_o)
        documents = (query_embeds, query_mask, self.table, document_ids, document_mask, query_index)
        check_clue_attention(*documents, *weights, num_heads)
        if uses_reference(self.table.device):
            return clue_attention(*documents, *weights, num_heads=num_heads)
        refuse_transforms("ProjectedTable.attend", query_embeds, w_q, w_o, b_q, b_o)
        x = query_embeds.masked_fill(~query_mask[:, :, None], 0)
        queries = _heads(linear(x, w_q, b_q), num_heads).to(self.dtype)  # [Q, H, T, D / H]
        queries = queries * scale_of(queries)
        heads = (self._heads_of_all if self.all_at_once else self._heads_of_some)(
            queries, document_ids, document_mask, query_index
        )
        if heads is None:
            return clue_attention(*documents, *weights, num_heads=num_heads)
        return project_heads(heads, query_mask, document_mask, query_index, w_o, None, self.b_v, b_o)

    def _heads_of_all(self, queries: Tensor, *documents: Tensor) -> Tensor | None:
        """Project the whole table if this has not been done, then attend; None if it does not fit."""
        if self.capacity == 0:
            return None
        if self.used == 0:
            with exact_float32(self.table):
                torch.mm(self.table, self.w_k.T, out=self.keys)
                torch.mm(self.table, self.w_v.T, out=self.values)
            self.used = self.capacity
        return projected_heads(queries, self.keys, self.values, *documents)

    def _heads_of_some(
        self, queries: Tensor, document_ids: Tensor, document_mask: Tensor, query_index: Tensor
    ) -> Tensor | None:
        """Project the rows that are missing, then attend; None if the distinct ids of a query do not fit."""
        Q, H, T, d = queries.shape
        pairs = Pairs(self.table, document_ids, document_mask, query_index, Q, T, H)
        if max((pairs.count_rows(query) for query in range(Q)), default=0) > self.capacity:
            return None
        heads = self.table.new_empty(len(pairs.queries), T, H * d)
        lse = heads.new_empty(heads.shape[0], pairs.R, dtype=pairs.dtype)
        scores, of_query, buffer = lse.new_empty(0), -1, list[Tensor]()
        for query, part, n in pairs.parts(slice(0, len(pairs.queries))):
            if query != of_query:
                self._project(pairs.distinct(query))
                keys = _heads(self.keys[self.place[pairs.distinct(query)]][None], H)[0]  # [H, U, D / H]
                scores = (keys @ queries[query].mT).permute(1, 2, 0)  # [U, T, H]
                scores = scores.reshape(len(scores), pairs.R)
                of_query = query
            weights = pairs.weights(scores, lse, query, part, n)
            ids = pairs.ids(part, n)
            places = torch.where(ids < 0, -1, self.place[ids.clamp_min(0)])
            values = gather(self.values, places, buffer)  # [P, n, D]
            for p in range(part.stop - part.start):  # one pair at a time: a batch over P and H would be copied
                of_heads = weights[p].view(n, T, H).permute(2, 1, 0)  # [H, T, n]
                mixed = of_heads @ values[p].view(n, H, d).transpose(0, 1)  # [H, T, D / H]
                heads[part.start + p] = mixed.transpose(0, 1).reshape(T, H * d)
        return pairs.unsorted(heads)

    def _project(self, ids: Tensor) -> None:
        """Make sure that the rows of ``ids`` [U] are in the store."""
        missing = ids[self.place[ids] < 0]
        if missing.shape[0] > self.capacity - self.used:
            self.place.fill_(-1)
            self.used, missing = 0, ids
        new = slice(self.used, self.used + missing.shape[0])
        self.place[missing] = torch.arange(new.start, new.stop, device=ids.device)
        rows = self.table[missing].to(self.dtype)
        torch.mm(rows, self.w_k.to(self.dtype).T, out=self.keys[new])
        torch.mm(rows, self.w_v.to(self.dtype).T, out=self.values[new])
        self.used = new.stop
