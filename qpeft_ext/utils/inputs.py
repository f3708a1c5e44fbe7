"""What a user hands to a public function: read once, as a list; what is wrong in it is named by its place."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Set


def as_list(items: object, what: str, remedy: str) -> list:
    """The items of a list, tuple, array, Series, column, generator, view, …, in their order, read once.

    Args:
        what: "rank: documents"; an error begins with it.  remedy: what to give instead of a text or a dict.
    Raises: TypeError for a text, a dict, a set, a table with columns, or what cannot be iterated.
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
        return list(items)
    except TypeError as error:  # an array without a dimension
        raise TypeError(f"{what} must be a list, got {kind_of(items)} ({error}); {remedy}") from None


def expect_text(text: object, place: str) -> str:
    """The text itself.

    Args:
        place: "query 2", "document 5 of query 0", …; an error begins with it.
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
    """``value`` as an int of at least ``least``; None stays None. numpy's integers are whole numbers.

    Raises: TypeError for a bool, a float or anything else; ValueError if it is too small.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{what} must be a whole number, got {kind_of(value)}")
    try:
        value = value.__index__()
    except TypeError:  # numpy.bool, an array
        raise TypeError(f"{what} must be a whole number, got {kind_of(value)}") from None
    if value < least:
        raise ValueError(f"{what} must be at least {least}, got {value}")
    return value


def kind_of(value: object) -> str:
    """What it is and, short, its value: for messages."""
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
    """``repr`` of a value, or with ``quoted=False`` a text as it is, cut at 60 characters."""
    if not isinstance(value, str):
        text = reprlib.repr(value)  # that of a list of a million texts is never built
    else:
        text = repr(value[:61]) if quoted else value
    return text if len(text) <= 60 else text[:57] + "..."
