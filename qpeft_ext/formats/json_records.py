"""Read the records of a JSON file of any size: a list, an object of records, or JSON lines; plain or .gz.

Only one record is in memory at a time, so a list of many gigabytes on a single line can be read.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from ..utils.files import AnyPath
from ..utils.text import shorten
from .io import check_kept, line_error, open_bytes, parse_object, read_lines, reading

MAX_RECORD = 1 << 26  # characters; the largest known, 1,000 passages with text, have about 2^20
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


class RecordPlace(int):
    """A line number with the number of a record, for files that have all records on one line."""

    record: int

    def __new__(cls, line: int, record: int) -> RecordPlace:
        place = super().__new__(cls, line)
        place.record = record
        return place

    def __str__(self) -> str:
        return f"{int(self)}, record {self.record}"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)  # the format of an int would drop the record


def read_records(path: AnyPath, key: str, what: str = "a JSON file") -> Iterator[tuple[RecordPlace, str | None, dict]]:
    """Yield (place, key in an object of records or None, record), in the order of the file.

    Args:
        key: a key of every record, which tells ``{"0": {key: …}, "1": …}`` from JSON lines.
        what: kind of the file, for errors.
    Raises: ValueError naming file, line and record for anything that is not a JSON object.
    """
    position = [0]
    with open_bytes(check_kept(path, what)) as file, reading(path, position):
        text = _Text(path, file, position)
        opening = text.peek()
        if opening == "[":
            yield from _list(text)
            return
        if opening == "{" and _is_object_of_records(text, key):
            yield from _object(text)
            return
    for record, (number, line) in enumerate(read_lines(path, what), start=1):
        place = RecordPlace(number, record)
        yield place, None, parse_object(path, place, line)


class _Text:
    """A window on the file: ``buffer`` from ``position`` on was not parsed yet."""

    def __init__(self, path: AnyPath, file, lines: list[int]) -> None:
        self.path, self.file = path, file
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.buffer, self.position, self.ended = "", 0, False
        self.lines = lines  # [line ends before the buffer]
        self.record = 0
        self.whole = True  # nothing was dropped yet, so the start can be parsed again

    def place(self) -> RecordPlace:
        return RecordPlace(self.lines[0] + self.buffer.count("\n", 0, self.position) + 1, self.record)

    def error(self, message: str) -> ValueError:
        return line_error(self.path, self.place(), message)

    def more(self) -> None:
        """Double what waits in the buffer, by a megabyte at least, so that a long record is parsed only a few times."""
        raw = self.file.read(max(1 << 20, len(self.buffer) - self.position))
        self.ended = not raw
        if not self.whole:
            self.lines[0] += self.buffer.count("\n", 0, self.position)
            self.buffer, self.position = self.buffer[self.position :], 0
        try:
            self.buffer += self.decoder.decode(raw, final=self.ended)
        except UnicodeDecodeError as error:
            raise self.error(
                f"expected UTF-8, got the byte 0x{error.object[error.start]:02x} in or after this record; "
                f"convert the file to UTF-8"
            ) from None

    def peek(self) -> str:
        """Return the next character that is no white space; "" at the end."""
        while True:
            if space := _SPACE.match(self.buffer, self.position):
                self.position = space.end()
            if self.position < len(self.buffer) or self.ended:
                return self.buffer[self.position : self.position + 1]
            self.more()

    def expect(self, wanted: str) -> str:
        got = self.peek()
        if not got:
            raise self.error("the file ends in the middle; copy it again")
        if got not in wanted:
            raise self.error(f"expected {' or '.join(wanted)}, got {shorten(self.buffer[self.position :][:40])}")
        self.position += 1
        return got

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, self.position = _DECODER.raw_decode(self.buffer, self.position)
                return value
            except json.JSONDecodeError as error:
                # text that only lacks its end fails at its end, or where its last string begins
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.buffer) - 16
                if not cut or self.ended:
                    why = "the file ends in the middle; copy it again" if cut else error.msg
                    got = shorten(self.buffer[self.position :][:60])
                    raise self.error(f"expected a JSON value, got {got} ({why})") from None
            except (ValueError, RecursionError) as error:  # an int of too many digits, brackets without end
                raise self.error(
                    f"expected a JSON value, got {shorten(self.buffer[self.position :][:60])} ({error})"
                ) from None
            if len(self.buffer) - self.position > MAX_RECORD:
                raise self.error(f"a record of more than {MAX_RECORD:,} characters; is a quotation mark missing?")
            self.more()


def _is_object_of_records(text: _Text, key: str) -> bool:
    """Return True if the first value of the object is a record; the text stays at its start."""
    start = text.position
    text.position += 1
    try:
        if text.peek() == "}":
            return True  # an empty object holds no records
        if text.peek() != '"':
            return False
        text.value()
        if text.peek() != ":":
            return False
        text.position += 1
        value = text.value() if text.peek() == "{" else None
        return isinstance(value, dict) and key in value
    finally:
        text.position = start


def _list(text: _Text) -> Iterator[tuple[RecordPlace, str | None, dict]]:
    text.expect("[")
    text.whole = False
    if text.peek() == "]":
        text.position += 1
    else:
        while True:
            yield _record(text, None)
            if text.expect(",]") == "]":
                break
    _end(text)


def _object(text: _Text) -> Iterator[tuple[RecordPlace, str | None, dict]]:
    text.expect("{")
    text.whole = False
    if text.peek() == "}":
        text.position += 1
    else:
        while True:
            if text.peek() != '"':
                text.expect('"')
            key = text.value()
            text.expect(":")
            yield _record(text, key)
            if text.expect(",}") == "}":
                break
    _end(text)


def _record(text: _Text, key: str | None) -> tuple[RecordPlace, str | None, dict]:
    text.record += 1
    text.peek()
    place = text.place()
    value = text.value()
    if not isinstance(value, dict):
        raise line_error(text.path, place, f"expected a JSON object, got {shorten(value)}")
    return place, key, value


def _end(text: _Text) -> None:
    if text.peek():
        raise text.error(f"expected the end of the file, got {shorten(text.buffer[text.position :][:40])}")
