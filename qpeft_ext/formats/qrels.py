"""Read qrels from a table of three columns (query, document, relevance) or TREC's four, with or without a header.

A line with tabs is cut at them, so its ids may contain blanks; any other line is cut at white space. All lines of a
file have as many columns as the first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, cast

from ..utils.files import AnyPath
from ..utils.text import shorten
from .io import expect_no_mark, line_error, read_lines
from .trec import Qrels, split_columns, whole_number

BEIR_HEADER = ("query-id", "corpus-id", "score")
LARGEST_RELEVANCE = 1_000_000  # trec_eval counts grades in a table of that length, and ends the process where it fails
_EXPECTED = "query_id 0 doc_id relevance (TREC) or query-id<tab>corpus-id<tab>score (BEIR)"
_NAMES = {  # names of the columns in headers, in lower case and without "-" and "_"
    "query": ("queryid", "qid", "query", "topic", "topicid"),
    "document": ("corpusid", "docid", "documentid", "pid", "passageid", "docno", "doc", "document"),
    "relevance": ("score", "relevance", "rel", "label", "grade", "judgment", "judgement"),
    "iteration": ("iteration", "iter", "q0", "0"),
}
_NUMBER = re.compile(r"[0-9]|nan|inf", re.IGNORECASE)  # a relevance, if perhaps a wrong one
_POSITIONS = {3: {"query": 0, "document": 1, "relevance": 2}, 4: {"query": 0, "document": 2, "relevance": 3}}


def read_table(path: AnyPath) -> Qrels:
    """Read qrels: query_id → doc_id → relevance, a whole number that is written as ``1`` or ``1.0``.

    Raises: ValueError naming file and line.
    """
    qrels: Qrels = {}
    count = 0
    places: dict[str, int] = {}
    for number, text in read_lines(path, "qrels"):
        expect_no_mark(path, number, text)
        columns = split_columns(text)
        if not count:
            count, header = len(columns), _header(path, number, columns)
            places = header or _POSITIONS.get(count, {})
            if not places:
                raise line_error(path, number, f"expected {_EXPECTED}, got {_got(text, columns)}")
            if header:
                continue
            if not _NUMBER.search(columns[places["relevance"]]):
                raise line_error(
                    path,
                    number,
                    f"expected a whole number as relevance, or a header such as "
                    f"{' '.join(BEIR_HEADER)}, got {shorten(text)}",
                )
        if len(columns) != count:
            hint = "; an id with blanks needs tabs between the columns" if len(columns) > count else ""
            raise line_error(
                path, number, f"expected {count} columns as on the first line, got {_got(text, columns)}{hint}"
            )
        if not all(column.strip() for column in columns):
            raise line_error(path, number, f"one of the {count} columns is empty: {shorten(text)}")
        if "\t" not in text and count == 4 and not _is_iteration(columns[1]):
            raise line_error(
                path,
                number,
                f"expected 0 or Q0 as the second of 4 columns, got {shorten(text)}; "
                f"an id with blanks needs tabs between the columns",
            )
        query_id, doc_id, relevance = (columns[places[name]] for name in ("query", "document", "relevance"))
        judged = qrels.setdefault(query_id, {})
        if doc_id in judged:
            raise line_error(
                path,
                number,
                f"document {shorten(doc_id)} is judged twice for query {shorten(query_id)}; remove one line",
            )
        judged[doc_id] = whole_number(path, number, "relevance", relevance)
        if abs(judged[doc_id]) > LARGEST_RELEVANCE:
            raise line_error(
                path, number, f"expected a relevance of at most {LARGEST_RELEVANCE:,}, got {shorten(relevance)}"
            )
    if not qrels:
        raise ValueError(f"{path}: the qrels are empty; expected lines {_EXPECTED}")
    return qrels


def whole_relevance(where: str, value: object) -> int:
    """Return a relevance that is given as a value, not as text. Raises: ValueError if it is no whole number."""
    try:
        number = float(cast(Any, value))
    except (TypeError, ValueError):
        number = math.nan
    if not number.is_integer():
        raise ValueError(f"{where}: expected a whole number as relevance, got {shorten(value)}")
    return int(number)


def _header(path: AnyPath, number: int, columns: Sequence[str]) -> dict[str, int]:
    """Return name → number of the columns of a header; {} if the line is no header."""
    plain = [column.strip().lower().replace("-", "").replace("_", "") for column in columns]
    places = {name: plain.index(word) for name, words in _NAMES.items() for word in words if word in plain}
    if len(columns) == 1 and plain[0].count(",") in (2, 3):
        raise line_error(
            path,
            number,
            f"expected columns with tabs or blanks between them, got commas: {shorten(columns[0])}; write {_EXPECTED}",
        )
    if len(places) == len(columns) and {"query", "document", "relevance"} <= places.keys():
        return places
    return {}


def _is_iteration(text: str) -> bool:
    return text.lower() in ("q0", "-") or text.lstrip("+-").isdigit()


def _got(text: str, columns: Sequence[str]) -> str:
    return f"{len(columns)}: {shorten(text)}"
