"""Templates: the words of a prompt, one file each. `QPeftConfig.template` names one of them."""

from __future__ import annotations

from ...config import QPeftConfig
from .base import Template, TemplatePieces
from .chat import chat
from .qpeft import clues_first, qpeft
from .upr import upr
from .words import Words

BY_NAME: dict[str, Template] = {"qpeft": qpeft, "upr": upr, "chat": chat}


def pieces_of(words: Words, config: QPeftConfig) -> TemplatePieces:
    """Make the pieces of the template and the layout that a config names.

    Raises: ValueError if the template cannot be made with this tokenizer.
    """
    template = clues_first if config.layout == "clues_first" else BY_NAME[config.template]
    return template(words, config)
