"""`QPeftConfig`: every option of the method, stored with an adapter as ``adapter_config.json``."""

from .options import QPeftConfig
from .values import (
    CLUE_EMBEDDINGS,
    CLUES,
    COMPAT,
    DEFAULT_INSTRUCTION,
    DISTILLATION,
    FILTERS,
    LAYOUTS,
    LOSSES,
    OFFICIAL,
    OFFICIAL_INSTRUCTION,
    SCORES,
    SELECTIONS,
    SIMILARITIES,
    SOFT_PROMPT_INITS,
    SOURCES,
    SPECIAL_TOKENS,
    TEMPLATES,
)

__all__ = [
    "CLUES",
    "CLUE_EMBEDDINGS",
    "COMPAT",
    "DEFAULT_INSTRUCTION",
    "DISTILLATION",
    "FILTERS",
    "LAYOUTS",
    "LOSSES",
    "OFFICIAL",
    "OFFICIAL_INSTRUCTION",
    "SELECTIONS",
    "SIMILARITIES",
    "SOFT_PROMPT_INITS",
    "SOURCES",
    "SCORES",
    "SPECIAL_TOKENS",
    "TEMPLATES",
    "QPeftConfig",
]
