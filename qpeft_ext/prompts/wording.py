"""The words of a template as token ids, and between them the gaps that texts go into."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..utils.text_templates import Part, Place
from ..utils.text_tokens import TextTokenizer
from .templates.words import Words

_LINE_ENDS = re.compile(r"\s*\n")
_SPACES = re.compile(r"[^\S\n]*\Z")


@dataclass(frozen=True)
class Gap:
    """A place that a text goes into, and what is tokenised with the text.

    Attributes:
        place: which text.
        before: how the text before it ends; "": it begins a text.
        lead: the spaces before it, which belong to its first word.
        ends: the line ends behind it, which its last word may be joined with; those behind a document are not
            in it, since a document may be cut.
    """

    place: Place
    before: str = ""
    lead: str = ""
    ends: str = ""

    def encode(self, texts: Sequence[str], tokenizer: TextTokenizer, words: Words) -> list[list[int]]:
        """Tokenise texts as they stand in the gap.

        Args:
            texts: the texts.
            tokenizer: reads the words of special tokens in them.
            words: of the template.
        """
        if self.lead == " " and self.before:
            return tokenizer([words.spaced(text) + self.ends for text in texts])
        given = [f"{self.lead}{text}{self.ends}" for text in texts]
        return tokenizer.continued(given, self.before) if self.before else tokenizer(given)


Fixed = tuple[int, ...]


def tokenise(parts: Sequence[Part], words: Words) -> list[Fixed | Gap]:
    """Tokenise what a template writes.

    The ids are those of the whole text, as far as a tokenizer splits texts before spaces and behind line ends; what
    follows a document is tokenised by itself. The special tokens before a text are put before it, unless it begins with
    them.

    Args:
        parts: of `text_templates.parts_of`.
        words: tokenises.
    """
    made: list[Fixed | Gap] = []
    before, lead = "", ""  # how the text so far ends, and the spaces at its end
    for place, part in enumerate(parts):
        if part is Place.CUT:
            before = ""
        elif isinstance(part, Place):
            made.append(Gap(part, before, lead))
            before, lead = "a", ""
        else:
            text = part
            if made and isinstance(gap := made[-1], Gap) and before and gap.place is not Place.DOCUMENT:
                ends = _line_ends(text)
                made[-1] = Gap(gap.place, gap.before, gap.lead, ends)
                text, before = text[len(ends) :], "\n" if ends else before
            following = parts[place + 1] if place + 1 < len(parts) else None
            if isinstance(following, Place) and following is not Place.CUT:
                lead = (_SPACES.search(text) or [""])[0]
                text = text.removesuffix(lead)
            if text:
                made.append(words.continued(text, before) if before else words(text)[0])
                before = _end(text, words)
    first = made[0] if isinstance(made[0], tuple) else ()
    return made if first[: len(words.before)] == words.before else [words.before, *made]


def _line_ends(text: str) -> str:
    found = _LINE_ENDS.match(text)
    return "" if found is None else found[0]


def _end(text: str, words: Words) -> str:
    """Return the last line of a text, behind its last special token: what a tokenizer may join the next text with."""
    added = map(str, words.tokenizer.added_tokens_decoder.values())
    for token in (*words.tokenizer.all_special_tokens, *added):
        text = text[text.rfind(token) + len(token) :] if token in text else text
    return text[text[:-1].rfind("\n") + 1 :]
