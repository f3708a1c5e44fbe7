"""The pieces that a template makes of its words, and the type of the function that makes them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

from ...config import QPeftConfig
from ..pieces import CluesFirstPieces, SuffixPieces
from .words import Words


@dataclass(frozen=True)
class AroundInstruction:
    """The fixed tokens around an instruction of one query, which stands between clues and query.

    behind_clues, bare: before the instruction, with clues and without.
    question: behind it.
    """

    behind_clues: tuple[int, ...]
    bare: tuple[int, ...]
    question: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TemplatePieces:
    """The fixed tokens of a prompt.

    head, tail: before and after the text of a document.
    suffix: around clues and query.
    around_instruction: around an instruction of one query; None where the template has no place for one.
    instruction_ids: the tokens that a soft prompt replaces; () without one.
    soft_prompt_start: how many tokens of ``head`` stand before the soft prompt.
    query_follows_word: whether a query follows a word, so that a space stands between them; otherwise it begins a line.
    query_is_answer: whether a query is the answer of a conversation, so that nothing can be asked behind it.
    scores_special_tokens: whether an encoder–decoder LM is asked for the special tokens around a query too.
    """

    head: tuple[int, ...]
    tail: tuple[int, ...]
    suffix: SuffixPieces | CluesFirstPieces
    around_instruction: AroundInstruction | None = None
    instruction_ids: tuple[int, ...] = ()
    soft_prompt_start: int = 0
    query_follows_word: bool = True
    query_is_answer: bool = False
    scores_special_tokens: bool = False


class Template(Protocol):
    """Makes the pieces of a prompt."""

    def __call__(self, words: Words, config: QPeftConfig) -> TemplatePieces:
        """Tokenise the words of the template, for the prompt of a causal LM.

        Args:
            words: tokenises.
            config: instruction, number of virtual tokens, and whether there are clues.
        Raises: ValueError if this tokenizer cannot make the template.
        """
        ...


def for_encoder_decoder(pieces: TemplatePieces, words: Words, config: QPeftConfig) -> TemplatePieces:
    """Split a prompt into what the encoder reads, all but the query, and what the decoder reads."""
    suffix = pieces.suffix
    assert isinstance(suffix, SuffixPieces), "an encoder–decoder LM has no other layout"
    question, bare, tail = suffix.question + words.after, suffix.bare_question + words.after, pieces.tail
    if config.clues == "none":  # then the encoder's input depends on the document only
        tail, bare = tail + bare, ()
    around: dict[str, Any] = {"given": words.before}
    if pieces.scores_special_tokens:
        around = {"scored_before": words.before, "scored_after": words.after}
    return replace(pieces, tail=tail, suffix=SuffixPieces(suffix.hints, question, bare, **around))
