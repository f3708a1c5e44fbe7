"""The template "qpeft", in both layouts.

    {instruction} Passage: {title} {text}\\n  |  hints: <clue vectors>\\nQuestion: {query}

With ``num_virtual_tokens`` a trained soft prompt takes the place of the instruction. With ``layout="clues_first"``:

    {instruction} hints: <clue vectors>\\n Passage: {title} {text}\\nQuestion: {query}

An instruction of one query stands before "Question:": ``Instruction: {instruction of the query}\\nQuestion: {query}``.
"""

from __future__ import annotations

from ...config import QPeftConfig
from ..pieces import CluesFirstPieces, SuffixPieces
from .base import AroundInstruction, TemplatePieces
from .words import Words


def qpeft_pieces(words: Words, config: QPeftConfig) -> TemplatePieces:
    """Make the pieces with the document first (`base.Template`)."""
    instruction = config.instruction.strip()
    instruction_ids: tuple[int, ...] = ()
    head, tail, hints, question, bare = words(
        f"{instruction} Passage:".strip(), "\n", "hints:", "\nQuestion:", "Question:"
    )
    if config.num_virtual_tokens is not None:
        instruction_ids, passage = words(instruction, words.spaced("Passage:"))
        head = (0,) * config.num_virtual_tokens + passage
    return TemplatePieces(
        head=words.before + head,
        tail=tail,
        suffix=SuffixPieces(hints, question, bare),
        around_instruction=_around_instruction(words),
        instruction_ids=instruction_ids,
        soft_prompt_start=len(words.before),
    )


def clues_first_pieces(words: Words, config: QPeftConfig) -> TemplatePieces:
    """Make the pieces with the clues before the document, so that nothing can be shared (`base.Template`)."""
    head, newline, hints, question, passage = words(
        config.instruction.strip(), "\n", words.spaced("hints:"), "Question:", words.spaced("Passage:")
    )
    suffix = CluesFirstPieces(words.before + head, hints, newline, question)
    return TemplatePieces(head=passage, tail=newline, suffix=suffix, around_instruction=_around_instruction(words))


def _around_instruction(words: Words) -> AroundInstruction:
    return AroundInstruction(*words("\nInstruction:", "Instruction:", "\nQuestion:"))
