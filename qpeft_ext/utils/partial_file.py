"""`PartialFile`: the result of a long job that grows on the disk, survives a kill, and is resumed.

``OUTPUT.part`` has the pieces that are done, ``OUTPUT.part.json`` the settings of the job, and ``OUTPUT.part.sums`` a
line for each complete piece, which is written after it, so that an incomplete or changed piece is recognised.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from .console import Interrupted, say
from .files import AnyPath, AtomicWriter, check_target, is_gzip, sync_folder, why_unreadable, write_text
from .locks import open_locked
from .small_files import read_json

logger = logging.getLogger(__name__)

_SUM_BYTES = 32  # of a line of OUTPUT.part.sums: bytes of the piece, checksum


class PartialFile:
    """The finished pieces of a job, on the disk, for one process at a time.

    A piece is stored completely or not at all, so a kill costs at most the piece that is being written. Opening the
    same job again finds the complete pieces and drops what follows: an incomplete piece, or, with a warning, everything
    from the first changed piece on.

    Args:
        path: the final name of the result; the part is written beside it.
        settings: everything that the result depends on, name → value; a part with other settings is refused.
        about: further facts, which are written beside the settings for people to read.
        name: becomes part of the file's name where several parts share ``path``.
        resume: whether an earlier part is resumed; False starts over.

    Attributes: target: the final path of the result.  part: the growing file.  num_pieces: number of complete pieces.
        start_over: how a user begins anew, for messages.
    Raises: ValueError for other settings, or if a file of other content has the name ``OUTPUT.json``; OSError if
        ``path`` cannot be written.
    """

    start_over = "--no-resume (resume=False)"

    def __init__(
        self,
        path: AnyPath,
        settings: dict[str, object],
        *,
        about: dict | None = None,
        name: str = "",
        resume: bool = True,
    ) -> None:
        self.target = check_target(path)
        self._expect_no_other_file(path)
        self.part = self.target.with_name(f"{self.target.name}{f'.{name}' if name else ''}.part")
        self._about, self._sums = (self.part.with_name(f"{self.part.name}.{ending}") for ending in ("json", "sums"))
        self.num_pieces = 0
        self._size: int | None = None  # bytes of complete pieces; None while the file is not ours
        self._file: int | None = None
        self._sums_file: int | None = None
        try:
            self._file = open_locked(self.part, lambda: self._open_part(path), "let it end, or write to another file")
            there = self._sums.exists()
            check_target(self._sums)
            self._sums_file = _open(path, self._sums)
            if resume and (os.fstat(self._file).st_size or os.fstat(self._sums_file).st_size):  # pieces may be empty
                self._expect_settings(json.loads(json.dumps(settings)))
                self._read(there)
            else:
                self._size = 0
            self._cut()
            if not self.num_pieces:
                write_text(
                    self._about, json.dumps({"settings": settings} | (about or {}), indent=2) + "\n", follow=False
                )
        except BaseException:
            self.close()
            raise

    def _take(self, piece: bytes) -> None:
        """Take a complete piece of the part, in the order of writing. Raises: ValueError if it is not this job's."""
        raise NotImplementedError

    def _split(self, file: IO[bytes]) -> Iterator[bytes]:
        """Yield the pieces of a part without checksums, as earlier versions wrote it; the last may be incomplete."""
        raise NotImplementedError

    def append(self, piece: bytes) -> None:
        """Write a piece, completely or not at all.

        Args:
            piece: The bytes to append.

        Raises:
            OSError: If the disk is full.
        """
        assert self._file is not None and self._sums_file is not None and self._size is not None, "closed"
        try:
            _write(self._file, piece)
            _write(self._sums_file, _sum(piece))
        except OSError as error:
            self._cut()
            raise OSError(f"cannot write {self.part}: {error.strerror}; make room for it") from None
        self._size += len(piece)
        self.num_pieces += 1

    def finish(self) -> None:
        """Give the complete result its name, and keep the settings beside it as ``OUTPUT.json``."""
        assert self._file is not None, "closed"
        os.fsync(self._file)
        if is_gzip(self.target):
            with AtomicWriter(self.target) as whole, open(self.part, "rb") as part:
                while data := part.read(1 << 20):
                    whole.write(data)
                self._describe()
            self.discard()
            return
        self._describe()
        os.replace(self.part, self.target)
        sync_folder(self.target.parent)
        self._size = None
        for path in (self._sums, self._about):
            path.unlink(missing_ok=True)
        self.close()

    def _describe(self) -> None:
        """Write ``OUTPUT.json``. A result of other settings goes first: a kill must not leave it beside these."""
        about = self._about.read_text(encoding="utf-8")
        if written_with(self.target, json.loads(about)["settings"]):
            self.target.unlink(missing_ok=True)
        write_text(_settings_file(self.target), about)

    def discard(self) -> None:
        """Remove the part and all that is beside it."""
        self._size = self.num_pieces = 0
        self._cut()
        self.close()

    def close(self) -> None:
        """Close the file, which can be resumed. A part without any piece is removed."""
        if self._file is None:
            return
        if self.num_pieces and self._size is not None:
            self._cut()
        elif self._size == 0:  # the part last: its lock keeps other processes from all three files
            for path in (self._sums, self._about, self.part):
                path.unlink(missing_ok=True)
        for file in (self._sums_file, self._file):
            if file is not None:
                os.close(file)
        self._file = self._sums_file = None

    def _expect_no_other_file(self, path: AnyPath) -> None:
        """Check that `finish` will replace no file of somebody else, such as ``data.json`` for an output ``data``."""
        beside = _settings_file(self.target)
        if os.path.lexists(beside) and _settings_in(beside) is None:
            raise ValueError(
                f"the settings of {path} are written beside it, and would replace {beside}, which holds something "
                "else; name another output"
            )

    def _open_part(self, path: AnyPath) -> int:
        """Open the part, and refuse it if it cannot become a regular file."""
        check_target(self.part)
        return _open(path, self.part)

    def _expect_settings(self, settings: dict) -> None:
        then = _settings_in(self._about)
        if then is None:
            raise ValueError(
                f"{self.part} is of an unknown job, since {self._about.name} is missing or damaged; "
                f"start over with {self.start_over}"
            )
        if changed := _differences(then, settings):
            raise ValueError(
                f"{self.part} is of a job with other settings: {changed}; give those again to resume it, or start "
                f"over with {self.start_over}"
            )

    def _read(self, with_sums: bool) -> None:
        """Take the complete pieces of the part, up to the first that is incomplete or changed."""
        sums = _lines(self._sums.read_bytes()) if with_sums else None
        size = lines = 0
        with open(self.part, "rb") as file:
            for number, piece in enumerate(self._split(file) if sums is None else _recorded(file, sums)):
                try:
                    if sums is not None and _sum(piece) != sums[number]:
                        raise ValueError("another checksum")
                    self._take(piece)
                except ValueError:
                    if sums is not None:
                        logger.warning(
                            "%s was changed from line %d on since it was written: those lines are dropped "
                            "and made again",
                            self.part,
                            lines + 1,
                        )
                    break
                size, lines = size + len(piece), lines + piece.count(b"\n")
                self.num_pieces += 1
                if sums is None and self._sums_file is not None:
                    _write(self._sums_file, _sum(piece))
        self._size = size

    def _cut(self) -> None:
        """Drop everything behind the complete pieces."""
        for file, size in ((self._file, self._size), (self._sums_file, self.num_pieces * _SUM_BYTES)):
            if file is not None and size is not None:
                with contextlib.suppress(OSError):  # reading the part drops it too
                    os.ftruncate(file, size)
                    os.lseek(file, size, os.SEEK_SET)


class ResultWriter(AtomicWriter):
    """An `AtomicWriter` of a result that no settings are kept of: ``PATH.json`` of the result before it is removed."""

    def close(self) -> None:
        with contextlib.suppress(OSError):  # such as settings of another user, which the result does not need
            if _settings_in(beside := _settings_file(self.path)) is not None:
                beside.unlink(missing_ok=True)
        super().close()


@contextlib.contextmanager
def kept(partial: PartialFile) -> Iterator[None]:
    """Say what is resumed, and after an interruption or an error what is kept; close the file at the end.

    Args:
        partial: the file that the work inside grows.
    """
    try:
        if partial.num_pieces:
            say(f"{partial}: going on from there")
        yield
    except KeyboardInterrupt:
        there = f"; {partial}: the same command goes on from there" if partial.num_pieces else ""
        raise Interrupted(f"interrupted{there}") from None
    except Exception as error:
        if partial.num_pieces:
            error.add_note(f"{partial}: the same command goes on from there")
        raise
    finally:
        partial.close()


def written_with(path: AnyPath, settings: dict[str, object]) -> str:
    """Say what is wrong with a complete result, where it is to be used again.

    Args:
        path: of the result.
        settings: what it should have been made with.
    Returns: "" if it is there and was made with them.
    """
    then = _settings_in(_settings_file(Path(path)))
    if then is None or not os.path.exists(path):
        return "was made with unknown settings"
    changed = _differences(then, json.loads(json.dumps(settings)))
    return f"was made with other settings: {changed}" if changed else ""


def _settings_file(target: Path) -> Path:
    return target.with_name(f"{target.name}.json")


def _settings_in(about: Path) -> dict | None:
    """Return the settings in the file beside a part or a result; None if it is missing or damaged.

    Raises: OSError if it is there and cannot be read.
    """
    try:
        settings = read_json(about)["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if why_unreadable(error):
            raise
        return None
    return settings if isinstance(settings, dict) else None


def _differences(then: dict, now: dict) -> str:
    """Say which settings differ; "" if none does."""
    names = (*now, *(name for name in then if name not in now))
    return "; ".join(
        f"{name} was {then.get(name)}, is {now.get(name)}" for name in names if then.get(name) != now.get(name)
    )


def _open(path: AnyPath, file: AnyPath) -> int:
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}; choose another place") from None


def _write(file: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


def _sum(piece: bytes) -> bytes:
    """Return the line of ``OUTPUT.part.sums`` for a piece: its length and its checksum."""
    return f"{len(piece):<14} {hashlib.sha256(piece).hexdigest()[:16]}\n".encode()


def _lines(sums: bytes) -> list[bytes]:
    """Return the complete lines of ``OUTPUT.part.sums``."""
    return [sums[start : start + _SUM_BYTES] for start in range(0, len(sums) - _SUM_BYTES + 1, _SUM_BYTES)]


def _recorded(file: IO[bytes], sums: list[bytes]) -> Iterator[bytes]:
    """Yield a piece for each line of checksums; a piece is empty if its line gives no length."""
    size = os.fstat(file.fileno()).st_size  # reading makes room first for as many bytes as a damaged line may ask for
    for line in sums:
        length = line.split(b" ")[0]
        yield file.read(min(int(length), size)) if length.isdigit() else b""
