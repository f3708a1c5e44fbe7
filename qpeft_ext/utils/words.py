"""Suggestions for a word that a user may have mistyped."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest_words(word: object, known: Iterable[str], most: int = 1, cutoff: float = 0.6) -> list[str]:
    """Return at most ``most`` of the ``known`` words that resemble ``word``, the most similar first."""
    return difflib.get_close_matches(str(word)[:60], list(known), n=most, cutoff=cutoff)


def did_you_mean(word: object, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return ``"; did you mean 'x'?"`` with the most similar of the ``known`` words, or "" if none is similar."""
    close = closest_words(word, known, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""
