"""Reading for all formats: lines with their numbers, JSON objects, checked texts and ids."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from ..utils.files import AnyPath, is_gzip
from ..utils.text import shorten

BYTE_ORDER_MARK = "\ufeff"
_UNPACK = "decompress it, or compress it with gzip and let its name end in .gz"
_COMPRESSED = {  # how compressed files begin
    b"\x1f\x8b": ("a gzip", "let its name end in .gz"),
    b"\x28\xb5\x2f\xfd": ("a zstd", _UNPACK),
    b"\xfd7zXZ": ("an xz", _UNPACK),
    b"BZh": ("a bzip2", _UNPACK),
    b"PK\x03\x04": ("a zip", _UNPACK),
}


def line_error(path: AnyPath, number: int, message: str) -> ValueError:
    """Return the error for a bad line, "file, line n: …", of bounded length."""
    message = message if len(message) <= 600 else f"{message[:599]}…"
    return ValueError(f"{os.fspath(path)}, line {number}: {message}")


def check_file(path: AnyPath, what: str = "a file") -> Path:
    """Return ``path`` as a Path. Raises: ValueError or FileNotFoundError if it is not a file."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected {what}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; expected {what}")
    if not path.is_file() and not _is_given_open(path):
        raise ValueError(f"{path} is a pipe or a device, which may never end; expected {what}, or /dev/stdin")
    return path


def check_kept(path: AnyPath, what: str = "a file") -> Path:
    """Return ``path`` as `check_file` does, for a file that is opened twice: the bytes of a pipe would be gone.

    Raises: as `check_file`; ValueError for a pipe.
    """
    path = check_file(path, what)
    if not path.is_file():
        raise ValueError(
            f"{path} can be read only once, since it is a pipe or a terminal; expected {what}: write it into a file"
        )
    return path


def _is_given_open(path: Path) -> bool:
    """Return True for a pipe that the shell opened for this process (``/dev/stdin``, ``<(command)``) or a terminal."""
    place = os.path.realpath(path)
    return place.startswith("/proc/") and path.is_fifo() or place.startswith(("/dev/pts/", "/dev/tty", "/dev/null"))


@contextlib.contextmanager
def reading(path: AnyPath, position: list[int] | None = None) -> Iterator[None]:
    """Turn errors of a damaged gzip file into one ValueError. ``position[0]`` is the last line that was read."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        where = f" after line {position[0]}" if position and position[0] else ""
        raise ValueError(
            f"{os.fspath(path)}: not a whole gzip file{where} ({error}); copy or compress it again"
        ) from None


def decode(path: AnyPath, number: int, raw: bytes) -> str:
    """Return line ``number`` as text, without a byte order mark. Raises: ValueError if it is not UTF-8."""
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        for start, (kind, remedy) in _COMPRESSED.items() if number == 1 else ():
            if raw.startswith(start):
                raise ValueError(f"{os.fspath(path)}: expected text, got {kind} file; {remedy}") from None
        raise line_error(
            path,
            number,
            f"expected UTF-8, got the byte 0x{raw[error.start]:02x} at position "
            f"{error.start}; convert the file to UTF-8",
        ) from None


def expect_no_mark(path: AnyPath, number: int, text: str) -> None:
    """Check a line that begins with an id. Raises: ValueError for a byte order mark, which would be part of that id."""
    if text.startswith(BYTE_ORDER_MARK):
        raise line_error(
            path, number, "the line begins with a byte order mark, as where files are put together; remove the mark"
        )


def open_bytes(path: AnyPath) -> IO[bytes]:
    """Open a file, plain or .gz, for reading its uncompressed bytes."""
    return cast(IO[bytes], gzip.open(path, "rb")) if is_gzip(path) else open(path, "rb")


def read_lines(path: AnyPath, what: str = "a file") -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file, plain or .gz, as (number from 1, text without its line end).

    Lines with nothing but white space are skipped.
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
    """Return the JSON object on a line. Raises: ValueError naming file and line if it is none."""
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
    """Return ``record[key]``, which must be a text, not empty unless ``empty``. Raises: ValueError."""
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
    """Return ``record[key]`` as an id. A number becomes its digits, since ids in qrels and runs are text."""
    value = record.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return require_text(path, number, record, key)


def check_unicode(path: AnyPath, number: int, key: str, value: str) -> None:
    """Raises: ValueError for half a surrogate pair, which JSON can write, but no file or tokenizer accepts."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise line_error(path, number, f"half a surrogate pair under {key!r}; repair the \\u escape") from None
