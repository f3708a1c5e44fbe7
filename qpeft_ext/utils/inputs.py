"""Arguments of public functions: checked and read once, with errors that name the wrong item."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Set
from typing import SupportsIndex, cast


def as_list(items: object, what: str, remedy: str) -> list:
    """Return the items of a list, tuple, array, Series, column, generator, view, …, in their order, read once.

    Args:
        what: start of an error, such as "rank: documents".
        remedy: end of an error: what to give instead of a text or a dict.
    Raises: TypeError for a text, a dict, a set, a table with columns, or an object that cannot be iterated.
    """
    if type(items) is list:
        return list(items)  # the caller's may change while it is read
    if isinstance(items, (str, bytes, bytearray, Mapping)) or items is None:
        raise TypeError(f"{what} must be a list, got {kind_of(items)}; {remedy}")
    if isinstance(items, Set) and not hasattr(items, "mapping"):  # views of a dict have its order
        raise TypeError(f"{what} must be a list, got {kind_of(items)}, which has no order; give sorted(…) or list(…)")
    if hasattr(items, "columns") and hasattr(items, "iloc"):  # iterating a DataFrame gives the names of its columns
        raise TypeError(
            f"{what} must be a list, got a table ({type(items).__name__}); give one column of it, such as table['text']"
        )
    if not isinstance(items, Iterable) and not hasattr(items, "__getitem__"):
        raise TypeError(f"{what} must be a list, got {kind_of(items)}; {remedy}")
    try:
        return list(cast(Iterable, items))  # or a sequence by __getitem__, which list() takes too
    except TypeError as error:  # an array without a dimension
        raise TypeError(f"{what} must be a list, got {kind_of(items)} ({error}); {remedy}") from None


def expect_text(text: object, place: str) -> str:
    """Return the text itself.

    Args:
        place: start of an error, such as "query 2" or "document 5 of query 0".
    Raises: TypeError if it is not a string; ValueError for half a surrogate pair, which no tokenizer takes.
    """
    if not isinstance(text, str):
        hint = "; decode it: text.decode('utf-8')" if isinstance(text, (bytes, bytearray)) else ""
        raise TypeError(f"{place} must be a string, got {kind_of(text)}{hint}")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{place} has half a surrogate pair, {text[error.start]!r}, at character {error.start}; "
                "repair it: text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
            ) from None
    return text


def whole_number(value: object, what: str, least: int = 1) -> int | None:
    """Return ``value`` as an int of at least ``least``; None stays None. Integers of numpy are accepted.

    Raises: TypeError for a bool, a float or anything else; ValueError if it is too small.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise TypeError(f"{what} must be a whole number, got {kind_of(value)}")
    try:
        number = value.__index__()
    except TypeError:  # numpy.bool, an array
        raise TypeError(f"{what} must be a whole number, got {kind_of(value)}") from None
    if number < least:
        raise ValueError(f"{what} must be at least {least}, got {number}")
    return number


def true_or_false(value: object, what: str) -> bool:
    """Return ``value`` as a bool; those of numpy are accepted.

    Raises: TypeError for anything else, such as "no", which would count as True.
    """
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"{what} must be True or False, got {kind_of(value)}")
    return bool(value)


def kind_of(value: object) -> str:
    """Return the type of a value and, shortened, the value itself, for messages."""
    if value is None:
        return "None"
    if isinstance(value, float):
        return f"{value!r} (a missing value?)" if value != value else repr(value)
    if isinstance(value, str):
        return f"the string {short(str(value))}"
    if isinstance(value, Mapping):
        return f"a dict with the keys {short(', '.join(map(str, value)), quoted=False) or 'none'}"
    return f"{type(value).__name__} {short(value)}"


def short(value: object, quoted: bool = True) -> str:
    """Return ``repr`` of a value, or with ``quoted=False`` a text as it is, cut at 60 characters."""
    if not isinstance(value, str):
        text = reprlib.repr(value)  # which does not build the text of a list of a million texts
    else:
        text = repr(value[:61]) if quoted else value
    return text if len(text) <= 60 else text[:57] + "..."
