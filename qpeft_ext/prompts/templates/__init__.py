"""Templates: the words of a prompt, one file each. `QPeftConfig.template` names one of them."""

from __future__ import annotations

from ...config import QPeftConfig
from .base import Template, TemplatePieces
from .chat import chat_pieces
from .qpeft import clues_first_pieces, qpeft_pieces
from .upr import upr_pieces
from .words import Words

BY_NAME: dict[str, Template] = {"qpeft": qpeft_pieces, "upr": upr_pieces, "chat": chat_pieces}


def pieces_of(words: Words, config: QPeftConfig) -> TemplatePieces:
    """Make the pieces of the template and the layout that a config names.

    Raises: ValueError if the template cannot be made with this tokenizer.
    """
    template = clues_first_pieces if config.layout == "clues_first" else BY_NAME[config.template]
    return template(words, config)
