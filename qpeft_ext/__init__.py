"""Rerank text with a frozen large language model, fast and exactly (Q-PEFT, arXiv 2404.04522)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .utils.environment import VERSION as __version__

if TYPE_CHECKING:
    from . import ops as ops
    from .adapters.attention_clues import AttentionClues as AttentionClues
    from .adapters.generated_lora import GeneratedLora as GeneratedLora
    from .adapters.layers import Clues as Clues
    from .adapters.top_k_clues import TopKClues as TopKClues
    from .config import QPeftConfig as QPeftConfig
    from .lm.loading import load_lm as load_lm
    from .model import QPeftModel as QPeftModel
    from .model import get_qpeft_model as get_qpeft_model
    from .prefixes.cache import DocumentCache as DocumentCache
    from .ranking.explain import Explanation as Explanation
    from .ranking.reranker import Reranker as Reranker
    from .training import losses as losses
    from .training.trainer import QPeftTrainer as QPeftTrainer
else:  # imported on first use, so that `qpeft --help` does not wait for torch
    from .utils.faces import lazy_names

    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        AttentionClues="adapters.attention_clues",
        Clues="adapters.layers",
        DocumentCache="prefixes.cache",
        Explanation="ranking.explain",
        GeneratedLora="adapters.generated_lora",
        QPeftConfig="config",
        QPeftModel="model",
        QPeftTrainer="training.trainer",
        Reranker="ranking.reranker",
        TopKClues="adapters.top_k_clues",
        get_qpeft_model="model",
        load_lm="lm.loading",
        losses="training.losses",
        ops="ops",
    )
    __all__ += ["__version__"]
