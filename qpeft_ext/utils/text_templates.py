"""Templates in the language of Jinja2, as texts between the places of variables; they run sandboxed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from .text import shorten

if TYPE_CHECKING:
    from jinja2 import nodes

MAX_CHARACTERS = 1 << 16
_ENDINGS = (".jinja", ".jinja2", ".j2", ".txt")
# What a template may be made of, by the names of jinja2's classes. There are no loops, calls or arithmetic: an adapter
# carries its template, and one from a stranger could run for ever or fill the memory, which the sandbox allows.
_STATEMENTS = {"Template", "Output", "TemplateData", "If"}
_EXPRESSIONS = {"Name", "Const", "Or", "And", "Not", "Compare", "Operand", "CondExpr", "Test", "Filter"}
_FILTERS = ("trim", "lower", "upper", "capitalize", "default")


class Place(Enum):
    """A variable of a template.

    Attributes:
        QUERY, DOCUMENT, INSTRUCTION: the text that stands there.
        CUT: nothing; what stands before it and behind it is tokenised separately.
    """

    QUERY = "query"
    DOCUMENT = "document"
    INSTRUCTION = "instruction"
    CUT = "cut"


Part = str | Place


def looks_like_file(name: str) -> bool:
    """Tell whether the name of a template means a file."""
    return Path(name).is_file() or name.endswith(_ENDINGS) or "/" in name


def looks_like_text(name: str) -> bool:
    """Tell whether a template is given as its own text."""
    return "{{" in name or "{%" in name


def read_template(path: str) -> str:
    """Read a template.

    Args:
        path: of the file, UTF-8.
    Returns: its text.
    Raises: ValueError for a file that is missing, too large, no text, or writes no variable.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"template: there is no file {path}")
    try:
        with open(file, encoding="utf-8") as opened:
            text = opened.read(MAX_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"template: {path} cannot be read as a text in UTF-8: {error}") from None
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"template: {path} must have at most {MAX_CHARACTERS} characters")
    if not looks_like_text(text):
        raise ValueError(
            f"template: {path} is no template of Jinja2: it must write {{{{ query }}}} and {{{{ document }}}}"
        )
    return text.removesuffix("\n")


def parts_of(template: str, instruction: str | None) -> tuple[Part, ...]:
    """Split what a template writes at the places of its variables.

    The template is run once, with a marker for each variable.

    Args:
        template: its text, with the variables of `Place`.
        instruction: the text that the variable is; None: it has a place of its own.
    Returns: texts and places, in their order; no text is empty.
    Raises: ValueError for a template that fails, has loops, calls or arithmetic, or does not write query and document
        once and unchanged.
    """
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    marks = {place: f"Qpeft{place.name.title()}GoesHere" for place in Place}
    given = {place.value: mark for place, mark in marks.items()}
    if instruction is not None:
        given[Place.INSTRUCTION.value] = instruction
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    try:
        parsed = environment.parse(template)
        refused = _refused(parsed)
        text = "" if refused else environment.from_string(parsed).render(given)
    except (TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, SyntaxError,
            TypeError, ValueError) as error:  # fmt: skip
        known = ", ".join(given)
        raise ValueError(
            f"template: Jinja2 cannot run it: {shorten(' '.join(str(error).split()))}; its variables are {known}"
        ) from None
    if refused:
        raise ValueError(f"template: {refused}")
    for place in (Place.QUERY, Place.DOCUMENT):
        if (count := text.count(marks[place])) != 1:
            raise ValueError(f"template: it must write {{{{ {place.value} }}}} once and unchanged, got {count} times")
    if text.count(marks[Place.INSTRUCTION]) > 1:
        raise ValueError("template: it must write {{ instruction }} at most once")
    places = {mark: place for place, mark in marks.items()}
    pieces = re.split(f"({'|'.join(places)})", text)
    return tuple(places.get(piece, piece) for piece in pieces if piece)


def _refused(template: nodes.Template) -> str | None:
    """Find what a template may not have. Returns: a message, or None for texts, variables, conditions, some filters."""
    from jinja2 import nodes

    for node in (template, *template.find_all(nodes.Node)):
        name = type(node).__name__
        if name not in _STATEMENTS | _EXPRESSIONS or (isinstance(node, nodes.Filter) and node.name not in _FILTERS):
            what = f"the filter {node.name!r}" if isinstance(node, nodes.Filter) else name
            return (
                f"line {node.lineno} has {what}; expected only variables, if, else, and, or, not, comparisons and the "
                f"filters {', '.join(_FILTERS)}"
            )
    return None


def query_first(parts: Iterable[Part]) -> bool:
    """Tell whether the query stands before the document."""
    order = [part for part in parts if part in (Place.QUERY, Place.DOCUMENT)]
    return order[0] is Place.QUERY
