"""The template "upr": the prompt of UPR, Sachan et al. 2022, arXiv 2204.07496.

Passage: {title} {text}  |  hints: <clue vectors>. Please write a question based on this passage. {query}
"""

from __future__ import annotations

from ...config import QPeftConfig
from ..pieces import SuffixPieces
from .base import TemplatePieces
from .words import Words

UPR_INSTRUCTION = ". Please write a question based on this passage."


def upr_pieces(words: Words, config: QPeftConfig) -> TemplatePieces:
    """Make the pieces (`base.Template`)."""
    head, hints = words("Passage:", words.spaced("hints:"))
    question = words.continued(UPR_INSTRUCTION)
    return TemplatePieces(
        head=words.before + head,
        tail=(),
        suffix=SuffixPieces(hints, question, question),
        soft_prompt_start=len(words.before),
        scores_special_tokens=True,
    )
