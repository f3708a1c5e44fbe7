"""Rerank text with a frozen large language model, fast and exactly (Q-PEFT, arXiv 2404.04522)."""

from __future__ import annotations

import importlib

from .utils.environment import VERSION as __version__

# The public names and their modules; loaded on first use, so that `qpeft --help` does not wait for torch.
_PUBLIC = {
    "AttentionClues": "adapters.attention_clues",
    "Clues": "adapters.layers",
    "DocumentCache": "prefixes.cache",
    "Explanation": "ranking.explain",
    "GeneratedLora": "adapters.generated_lora",
    "QPeftConfig": "config",
    "QPeftModel": "model",
    "QPeftTrainer": "training.trainer",
    "Reranker": "ranking.reranker",
    "TopKClues": "adapters.top_k_clues",
    "get_qpeft_model": "model",
    "load_lm": "lm.loading",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    if name == "ops":
        return importlib.import_module(".ops", __name__)
    if name == "losses":
        return importlib.import_module(".training.losses", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
