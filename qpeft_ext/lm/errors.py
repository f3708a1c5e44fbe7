"""Errors that the code of LMs raises where something does not fit."""

from __future__ import annotations

LM_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


def in_one_line(error: Exception) -> str:
    """The kind of an error and the beginning of its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
