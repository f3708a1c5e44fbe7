"""Q-PEFT-A: the query's tokens attend over the document's tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import QPeftConfig
from ..ops import clue_attention
from ..ops.clue_attention import attention_weights
from .filters import ClueFilter
from .inputs import ClueInputs
from .layers import Clues, Float32Module, Projection, ResidualMLP, resolved_rank
from .projected_rows import ProjectedRows


class AttentionClues(Float32Module):
    """Q-PEFT-A: multi-head attention of the query tokens over all document tokens, then the same MLP.

    One clue per query token. Equal to `torch.nn.MultiheadAttention` without attention dropout, whose ``state_dict`` can
    be loaded with ``rank=None``; the MLP then stays as it is. A document without any token gives no clues.

    Args:
        config: resolved `QPeftConfig`.
        width: D, of the embedding table.
        allowed: bool [V], the ids that are attended to; None attends to every token.
    """

    def __init__(self, config: QPeftConfig, width: int, allowed: Tensor | None = None) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.filter = None if allowed is None else ClueFilter(allowed, "query_tokens" in config.filters)
        rank = resolved_rank(config)
        self.q, self.k, self.v, self.o = (Projection(width, rank, config.attention_bias) for _ in range(4))
        self.dropout = nn.Dropout(config.dropout)
        self.mlp = ResidualMLP(width, rank, config.residual)

    def forward(
        self,
        inputs: ClueInputs,
        table: Tensor,
        scale: float,
        explain: bool = False,
        projected: ProjectedRows | None = None,
    ) -> Clues:
        """Compute the clues of B pairs.

        Args:
            inputs: the pairs.
            table: the LM's frozen embedding table, [V, D].
            scale: what the LM's embedding module multiplies a row of the table with.
            explain: whether the result has an explanation.
            projected: rows that earlier calls with it have projected, and this one may; used without gradient only.
                None: the result depends on the other arguments only, to the bit.
        """
        projections = (self.q, self.k, self.v, self.o)
        weights = [p.matrix(table.dtype) for p in projections]
        biases = [None if p.bias is None else p.bias.to(table.dtype) for p in projections]
        document_mask = self.filter.tokens(inputs, inputs.query_index) if self.filter else inputs.document_mask
        documents = (inputs.query_mask, table, inputs.document_ids, document_mask, inputs.query_index)
        query_embeds = table[inputs.query_ids]
        if projected is not None and projected.max_bytes and not torch.is_grad_enabled():
            parameters = (*self.k.parameters(), *self.v.parameters())
            store = projected.of(table, parameters, (weights[1], weights[2]), (biases[1], biases[2]))
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
        """Give the state of a `torch.nn.MultiheadAttention` our names, in place; the MLP keeps its values."""
        if not hasattr(self.q, "weight"):
            raise ValueError(
                f"a MultiheadAttention has full matrices, these AttentionClues have rank {len(self.q.b)}; use rank=None"
            )
        bias, given = self.q.bias, f"{prefix}in_proj_bias" in state
        if given and bias is None:
            raise ValueError("the MultiheadAttention has biases, these AttentionClues do not; use attention_bias=True")
        weights = [*state.pop(f"{prefix}in_proj_weight").chunk(3), state.pop(f"{prefix}out_proj.weight")]
        biases = [] if bias is None else [torch.zeros_like(bias)] * 4  # those of MultiheadAttention(bias=False)
        if given:
            biases = [*state.pop(f"{prefix}in_proj_bias").chunk(3), state.pop(f"{prefix}out_proj.bias")]
        state |= {f"{prefix}{name}.weight": weight for name, weight in zip("qkvo", weights, strict=True)}
        state |= {f"{prefix}{name}.bias": bias for name, bias in zip("qkvo", biases, strict=False)}
        state |= {f"{prefix}mlp.{name}": value for name, value in self.mlp.state_dict().items()}
