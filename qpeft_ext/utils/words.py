"""Words in messages: singular and plural, and suggestions for a word that a user may have mistyped."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


def closest_words(word: object, known: Iterable[str], most: int = 1, cutoff: float = 0.6) -> list[str]:
    """Return at most ``most`` of the ``known`` words that resemble ``word``, the most similar first."""
    return difflib.get_close_matches(str(word)[:60], list(known), n=most, cutoff=cutoff)


def did_you_mean(word: object, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return ``"; did you mean 'x'?"`` with the most similar of the ``known`` words, or "" if none is similar."""
    close = closest_words(word, known, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""


def counted(count: int, many: str, one: str | None = None, spec: str = "") -> str:
    """Return a number with what it counts: "1 query", "2 queries".

    Args:
        count: the number.
        many: what is counted, in the plural.
        one: the same in the singular; None for `singular` of it.
        spec: how the number is formatted.
    """
    return f"{count:{spec}} {(one or singular(many)) if count == 1 else many}"


def singular(many: str) -> str:
    """Return a phrase with its first plural in the singular: "query of other splits" for "queries of other splits"."""
    before, plural, after = re.split(r"\b([a-z]+s)\b(?!['’])", many, maxsplit=1)
    return before + (f"{plural[:-3]}y" if plural.endswith("ies") else plural[:-1]) + after
