"""What all formats share: reading lines with their numbers, JSON lines, and writing a file as a whole or not at all."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ..utils.files import AnyPath, is_gzip
from ..utils.text import shorten


def line_error(path: AnyPath, number: int, message: str) -> ValueError:
    """The error for a bad line: always "file, line n: …"; an id of thousands of characters does not make it longer."""
    message = message if len(message) <= 600 else f"{message[:599]}…"
    return ValueError(f"{os.fspath(path)}, line {number}: {message}")


def check_file(path: AnyPath, what: str = "a file") -> Path:
    """``path`` as a Path, or an error if it is not a file."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected {what}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; expected {what}")
    if not path.is_file() and not _is_given_open(path):
        raise ValueError(f"{path} is a pipe or a device, which may never end; expected {what}, or /dev/stdin")
    return path


def _is_given_open(path: Path) -> bool:
    """Whether it is a pipe that the shell opened for this process (``/dev/stdin``, ``<(command)``), or a terminal."""
    place = os.path.realpath(path)
    return place.startswith("/proc/") and path.is_fifo() or place.startswith(("/dev/pts/", "/dev/tty", "/dev/null"))


@contextlib.contextmanager
def reading(path: AnyPath, position: list[int] | None = None) -> Iterator[None]:
    """Turn the errors of a damaged gzip file into one ValueError. ``position[0]`` is the last line that was read."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        where = f" after line {position[0]}" if position and position[0] else ""
        raise ValueError(
            f"{os.fspath(path)}: not a whole gzip file{where} ({error}); copy or compress it again"
        ) from None


def decode(path: AnyPath, number: int, raw: bytes) -> str:
    """Line ``number`` as text; UTF-8 only. A byte order mark at the start of the file is no part of the text."""
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise line_error(
            path,
            number,
            f"expected UTF-8, got the byte 0x{raw[error.start]:02x} at position "
            f"{error.start}; convert the file to UTF-8",
        ) from None


def open_bytes(path: AnyPath) -> IO[bytes]:
    return gzip.open(path, "rb") if is_gzip(path) else open(path, "rb")


def read_lines(path: AnyPath, what: str = "a file") -> Iterator[tuple[int, str]]:
    """The lines of a text file, plain or .gz, as (number from 1, text without its line end).

    Lines of white space alone are not yielded: they hold nothing.
    Raises: ValueError naming file and line for undecodable bytes or a damaged gzip file; OSError if unreadable.
    """
    position = [0]
    with open_bytes(check_file(path, what)) as file, reading(path, position):
        for raw in file:
            position[0] += 1
            text = decode(path, position[0], raw).rstrip("\r\n")
            if text.strip():
                yield position[0], text


def parse_object(path: AnyPath, number: int, text: str) -> dict[str, Any]:
    """One line of a jsonl file, which must be a JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # JSONDecodeError is a ValueError, as are ints of too many digits
        raise line_error(
            path, number, f"expected one JSON object, got {shorten(text)} ({getattr(error, 'msg', error)})"
        ) from None
    if not isinstance(value, dict):
        raise line_error(path, number, f"expected a JSON object, got {shorten(value)}")
    return value


def require_text(path: AnyPath, number: int, record: dict[str, Any], key: str, *, empty: bool = False) -> str:
    """``record[key]`` as text; ``empty`` says whether it may be empty."""
    if key not in record:
        raise line_error(path, number, f"expected the key {key!r}, got the keys {shorten(sorted(record))}")
    value = record[key]
    if not isinstance(value, str):
        raise line_error(path, number, f"expected text under {key!r}, got {shorten(value)}")
    check_unicode(path, number, key, value)
    if not empty and not value.strip():
        raise line_error(path, number, f"{key!r} is empty; give it a text or remove the line")
    return value


def require_id(path: AnyPath, number: int, record: dict[str, Any], key: str = "_id") -> str:
    """``record[key]`` as an id. A number is taken as its digits, since qrels and runs know only text."""
    value = record.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return require_text(path, number, record, key)


def check_unicode(path: AnyPath, number: int, key: str, value: str) -> None:
    """JSON can spell half a surrogate pair, which no file can hold and no tokenizer takes."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise line_error(path, number, f"half a surrogate pair under {key!r}; repair the \\u escape") from None
