"""Q-PEFT-A: the query's tokens attend over the document's tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import QPeftConfig
from ..lm.state import writes
from ..ops import ProjectedTable, clue_attention
from ..ops.clue_attention import attention_weights
from .filters import ClueFilter
from .inputs import ClueInputs
from .layers import Clues, Float32Module, Projection, ResidualMLP


class AttentionClues(Float32Module):
    """Q-PEFT-A: multi-head attention of the query tokens over all document tokens, then the same MLP.

    One clue per query token. Equal to `torch.nn.MultiheadAttention` without attention dropout, whose ``state_dict`` can
    be loaded with ``rank=None``: the MLP stays as it is. A document without any token gives no clues.

    Args:
        config: resolved `QPeftConfig`.  width: D.
        allowed: bool [V], the ids that are attended to; None attends to every token.
    Attributes:
        projected_bytes: budget for keys and values of the table rows seen so far, which are reused between calls
            without gradient (`ProjectedTable`); 0 keeps none. ``projected_bytes_used`` says what is held now.
    """

    def __init__(self, config: QPeftConfig, width: int, allowed: Tensor | None = None) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.filter = None if allowed is None else ClueFilter(allowed, "query_tokens" in config.filters)
        self.q, self.k, self.v, self.o = (Projection(width, config.rank, config.attention_bias) for _ in range(4))
        self.dropout = nn.Dropout(config.dropout)
        self.mlp = ResidualMLP(width, config.rank, config.residual)
        self.projected_bytes = 0
        self._projected: tuple[tuple, ProjectedTable, list[Tensor]] | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_projected": None}  # it is known by addresses, which mean nothing elsewhere

    @property
    def projected_bytes_used(self) -> int:
        return self._projected[1].used_bytes if self._projected else 0

    def forget(self) -> None:
        """Reuse nothing that was projected for earlier calls: results then depend on the following calls alone."""
        if self._projected:
            self._projected[1].clear()

    def _projected_table(self, table: Tensor, w_k: Tensor, w_v: Tensor, b_k: Tensor | None, b_v: Tensor | None):
        """The rows projected so far; none when the table or a weight has changed since."""
        read = (table, *self.k.parameters(), *self.v.parameters())
        state = tuple((t.data_ptr(), writes(t), t.dtype) for t in read)
        state += (self.projected_bytes,)
        if self._projected is None or self._projected[0] != state:
            fresh = ProjectedTable(table, w_k, w_v, b_k, b_v, budget_bytes=self.projected_bytes)
            # with what it is made of, so that no other can take its address
            self._projected = (state, fresh, [t.detach() for t in read])
        return self._projected[1]

    def forward(
        self, inputs: ClueInputs, table: Tensor, scale: float, explain: bool = False, alone: bool = False
    ) -> Clues:
        """Clues of B pairs. ``table`` [V, D] is the LM's frozen embedding table, ``scale`` its factor.

        ``alone``: nothing computed for another call is reused: the result depends on the inputs alone, to the bit.
        """
        projections = (self.q, self.k, self.v, self.o)
        weights = [p.matrix(table.dtype) for p in projections]
        biases = [None if p.bias is None else p.bias.to(table.dtype) for p in projections]
        document_mask = self.filter.tokens(inputs, inputs.query_index) if self.filter else inputs.document_mask
        documents = (inputs.query_mask, table, inputs.document_ids, document_mask, inputs.query_index)
        query_embeds = table[inputs.query_ids]
        if self.projected_bytes and not alone and not torch.is_grad_enabled():
            store = self._projected_table(table, *weights[1:3], *biases[1:3])
            mixed = store.attend(query_embeds, inputs.query_mask, *documents[2:], weights[0], weights[3], biases[0],
                                 biases[3], num_heads=self.num_heads)  # fmt: skip
        else:
            mixed = clue_attention(query_embeds, *documents, *weights, *biases, num_heads=self.num_heads)
        mask = inputs.query_mask[inputs.query_index] & document_mask.any(1, keepdim=True)
        embeds = self.mlp(self.dropout(mixed.to(self.mlp.up.weight.dtype))) * scale * mask[..., None]
        explanation = None
        if explain:
            explanation = {
                "weights": attention_weights(
                    query_embeds, *documents, *weights[:2], *biases[:2], num_heads=self.num_heads
                )
            }
        return Clues(embeds, mask, explanation)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        if f"{prefix}in_proj_weight" in state_dict:
            self._rename_multihead_attention(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _rename_multihead_attention(self, state: dict[str, Tensor], prefix: str) -> None:
        """The state of a `torch.nn.MultiheadAttention` under our names, in place; the MLP keeps its values."""
        if not hasattr(self.q, "weight"):
            raise ValueError(
                f"a MultiheadAttention has full matrices, these AttentionClues have rank {len(self.q.b)}; use rank=None"
            )
        has_bias, given = self.q.bias is not None, f"{prefix}in_proj_bias" in state
        if given and not has_bias:
            raise ValueError("the MultiheadAttention has biases, these AttentionClues do not; use attention_bias=True")
        weights = [*state.pop(f"{prefix}in_proj_weight").chunk(3), state.pop(f"{prefix}out_proj.weight")]
        biases = [torch.zeros_like(self.q.bias)] * 4 if has_bias else []  # of a MultiheadAttention(bias=False)
        if given:
            biases = [*state.pop(f"{prefix}in_proj_bias").chunk(3), state.pop(f"{prefix}out_proj.bias")]
        state |= {f"{prefix}{name}.weight": weight for name, weight in zip("qkvo", weights, strict=True)}
        state |= {f"{prefix}{name}.bias": bias for name, bias in zip("qkvo", biases, strict=False)}
        state |= {f"{prefix}mlp.{name}": value for name, value in self.mlp.state_dict().items()}
