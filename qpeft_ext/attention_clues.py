"""Q-PEFT-A: the query's tokens attend over the document's tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .batch import ClueInputs
from .clue_layers import Clues, Projection, ResidualMLP
from .config import QPeftConfig
from .ops import ProjectedTable, clue_attention
from .ops.clue_attention import attention_weights


class AttentionClues(nn.Module):
    """Q-PEFT-A: multi-head attention of the query tokens over all document tokens, then the same MLP.

    One clue per query token. Equal to `torch.nn.MultiheadAttention` without attention dropout. A document without any
    token gives no clues.

    Attributes:
        projected_bytes: budget for keys and values of the table rows seen so far, which are reused between calls
            without gradient (`ProjectedTable`); 0 keeps none. ``projected_bytes_used`` says what is held now.
    """

    def __init__(self, config: QPeftConfig, width: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (Projection(width, config.rank) for _ in range(4))
        self.dropout = nn.Dropout(config.dropout)
        self.mlp = ResidualMLP(width, config.rank)
        self.projected_bytes = 0
        self._projected: tuple[tuple, ProjectedTable] | None = None

    @property
    def projected_bytes_used(self) -> int:
        return self._projected[1].used_bytes if self._projected else 0

    def _projected_table(self, table: Tensor, w_k: Tensor, w_v: Tensor, b_k: Tensor, b_v: Tensor) -> ProjectedTable:
        """The rows projected so far; none when the table or a weight has changed since."""
        state = tuple((t.data_ptr(), t._version) for t in (table, *self.k.parameters(), *self.v.parameters()))
        state += (self.projected_bytes,)
        if self._projected is None or self._projected[0] != state:
            fresh = ProjectedTable(table, w_k, w_v, b_k, b_v, budget_bytes=self.projected_bytes)
            self._projected = (state, fresh)
        return self._projected[1]

    def forward(
        self, inputs: ClueInputs, table: Tensor, scale: float, explain: bool = False, alone: bool = False
    ) -> Clues:
        """Clues of B pairs. ``table`` [V, D] is the LM's frozen embedding table, ``scale`` its factor.

        ``alone``: nothing computed for another call is reused: the result hangs on the inputs alone, to the bit.
        """
        projections = (self.q, self.k, self.v, self.o)
        weights = [p.matrix(table.dtype) for p in projections]
        biases = [p.bias.to(table.dtype) for p in projections]
        documents = (inputs.query_mask, table, inputs.document_ids, inputs.document_mask, inputs.query_index)
        query_embeds = table[inputs.query_ids]
        if self.projected_bytes and not alone and not torch.is_grad_enabled():
            store = self._projected_table(table, *weights[1:3], *biases[1:3])
            mixed = store.attend(query_embeds, inputs.query_mask, *documents[2:], weights[0], weights[3], biases[0],
                                 biases[3], num_heads=self.num_heads)  # fmt: skip
        else:
            mixed = clue_attention(query_embeds, *documents, *weights, *biases, num_heads=self.num_heads)
        mask = inputs.query_mask[inputs.query_index] & inputs.document_mask.any(1, keepdim=True)
        embeds = self.mlp(self.dropout(mixed.to(self.mlp.up.weight.dtype))) * scale * mask[..., None]
        explanation = None
        if explain:
            explanation = {
                "weights": attention_weights(
                    query_embeds, *documents, *weights[:2], *biases[:2], num_heads=self.num_heads
                )
            }
        return Clues(embeds, mask, explanation)
