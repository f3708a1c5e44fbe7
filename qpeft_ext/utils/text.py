"""Values and messages as short texts of one line."""

from __future__ import annotations

MAX_LINE = 300  # characters of an error at the command line


def shorten(value: object, width: int = 60) -> str:
    """Return ``repr`` of a value, cut to ``width`` characters, so that an error stays one line."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested without end; a number of thousands of digits
        text = f"a {type(value).__name__} that is too long to show"
    return text if len(text) <= width else text[: width - 1] + "…"


def one_line(text: str, width: int = MAX_LINE) -> str:
    """Return ``text`` on one line of at most ``width`` characters.

    The end, which says what to do, is kept. Control characters, which could change what a terminal shows, become
    "\N{REPLACEMENT CHARACTER}".
    """
    text = " ".join(text.split())
    text = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return text if len(text) <= width else f"{text[: width - 101]}…{text[-100:]}"
