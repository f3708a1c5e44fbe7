"""The trained part: clues that a query extracts from a document (Q-PEFT-R and Q-PEFT-A).

Clue modules read document tokens as ids into the LM's frozen embedding table and return vectors in the space of
``inputs_embeds``: a table row times whatever scale the LM's embedding module applies.
Source: Q-PEFT, https://arxiv.org/abs/2404.04522.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .attention_clues import AttentionClues as AttentionClues
    from .generated_lora import GeneratedLora as GeneratedLora
    from .layers import Clues as Clues
    from .top_k_clues import TopKClues as TopKClues
else:
    from ..utils.faces import lazy_names

    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        AttentionClues="attention_clues",
        Clues="layers",
        GeneratedLora="generated_lora",
        TopKClues="top_k_clues",
    )
