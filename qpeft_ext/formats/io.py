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

AnyPath = str | os.PathLike


def shorten(value: object, width: int = 60) -> str:
    """``repr`` of what came, cut to ``width`` characters, so that an error stays one line."""
    text = repr(value)
    return text if len(text) <= width else text[: width - 1] + "…"


def line_error(path: AnyPath, number: int, message: str) -> ValueError:
    """The error for a bad line: always "file, line n: …"; an id of thousands of characters does not make it longer."""
    message = message if len(message) <= 600 else f"{message[:599]}…"
    return ValueError(f"{os.fspath(path)}, line {number}: {message}")


def is_gzip(path: AnyPath) -> bool:
    return os.fspath(path).endswith(".gz")


def check_file(path: AnyPath, what: str = "a file") -> Path:
    """``path`` as a Path, or an error if it is not a file."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected {what}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; expected {what}")
    return path


@contextlib.contextmanager
def reading(path: AnyPath, position: list[int] | None = None) -> Iterator[None]:
    """Turn the errors of a damaged gzip file into one ValueError. ``position[0]`` is the last line that was read."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        where = f" after line {position[0]}" if position and position[0] else ""
        raise ValueError(
            f"{os.fspath(path)}: not a whole gzip file{where} ({error}); copy or compress it again") from None


def decode(path: AnyPath, number: int, raw: bytes) -> str:
    """Line ``number`` as text; UTF-8 only. A byte order mark at the start of the file is no part of the text."""
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise line_error(path, number, f"expected UTF-8, got the byte 0x{raw[error.start]:02x} at position "
                                       f"{error.start}; convert the file to UTF-8") from None


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
        raise line_error(path, number, f"expected one JSON object, got {shorten(text)} "
                                       f"({getattr(error, 'msg', error)})") from None
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


def check_target(path: AnyPath) -> Path:
    """Where a file of this name will lie: a link is followed, not replaced.

    Raises: OSError or ValueError if ``path`` cannot become a regular file.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise ValueError(f"{path} is a folder; expected the name of a file to write")
    if target.exists() and not target.is_file():
        raise ValueError(f"{path} is not a regular file, so it cannot be replaced as a whole; name a file")
    if not target.parent.is_dir():
        what = "is no folder" if target.parent.exists() else "does not exist; create it first"
        raise FileNotFoundError(f"cannot write {path}: the folder {target.parent} {what}")
    return target


class AtomicWriter:
    """A binary file that appears under its name only when it is complete.

    Everything goes to a temporary name beside it; `close` syncs and renames, an exception removes it. The target is
    checked and the temporary file opened at once, so an unwritable output is known before hours of work.

    Args:
        path: the final name; an existing regular file is replaced.
    Raises: OSError or ValueError if ``path`` cannot become a regular file.
    """

    def __init__(self, path: AnyPath) -> None:
        self.path = check_target(path)
        self.temporary = self.path.with_name(f".{self.path.name[:100]}.{os.urandom(6).hex()}.tmp")
        try:
            self.file: IO[bytes] = open(self.temporary, "xb")
        except OSError as error:
            raise OSError(f"cannot write {path}: {error.strerror}; choose another place") from None
        # no file name and no time in the header: the same content gives the same bytes
        self.stream = gzip.GzipFile("", "wb", fileobj=self.file, mtime=0) if is_gzip(self.path) else self.file

    def write(self, data: bytes) -> None:
        self.stream.write(data)

    def close(self) -> None:
        """Complete the file and give it its name."""
        try:
            if self.stream is not self.file:
                self.stream.close()
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            os.replace(self.temporary, self.path)
        except BaseException:
            self.discard()
            raise
        sync_folder(self.path.parent)

    def discard(self) -> None:
        """Give up: nothing is left, neither under the final nor under the temporary name."""
        with contextlib.suppress(OSError, ValueError):
            self.file.close()
        with contextlib.suppress(OSError):
            self.temporary.unlink()

    def __enter__(self) -> AtomicWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut; file systems that cannot do this are left alone."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: AnyPath, text: str) -> None:
    """Write ``text`` as UTF-8, as a whole or not at all."""
    with AtomicWriter(path) as file:
        file.write(text.encode("utf-8"))


def cache_folder() -> Path:
    """``$QPEFT_CACHE``, else ``~/.cache/qpeft_ext``; created if need be."""
    folder = Path(os.environ.get("QPEFT_CACHE") or Path.home() / ".cache" / "qpeft_ext").absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot create the cache folder {folder} ({error.strerror}); "
                      f"set QPEFT_CACHE to a folder that can be written") from None
    return folder
