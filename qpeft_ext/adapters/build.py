"""The trained part: clues that a query extracts from a document (Q-PEFT-R and Q-PEFT-A).

Clue modules read document tokens as ids into the LM's frozen embedding table and return vectors in the space of
``inputs_embeds``: a table row times whatever scale the LM's embedding module applies.
Source: Q-PEFT, https://arxiv.org/abs/2404.04522.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..config import QPeftConfig
from ..official.clues import build_official_clues
from .attention_clues import AttentionClues
from .filters import allowed_ids
from .layers import Clues
from .top_k_clues import TopKClues

__all__ = ["AttentionClues", "Clues", "TopKClues", "allowed_ids", "build_clues"]


def build_clues(config: QPeftConfig, table: Tensor, tokenizer) -> nn.Module | None:
    """The clue module of a resolved config over an embedding table [V, D]; None for ``clues="none"`` (UPR)."""
    if config.clues == "none":
        return None
    if config.compat == "official":
        return build_official_clues(config, table, tokenizer)
    if config.clues == "attention" and not config.filters:
        return AttentionClues(config, table.shape[1])
    allowed = allowed_ids(tokenizer, len(table), config.filters)
    if config.clues == "attention":
        return AttentionClues(config, table.shape[1], allowed)
    return TopKClues(config, table, allowed)
