"""`PartialFile`: the result of a long job that grows on the disk, survives a kill, and is gone on with.

``OUTPUT.part`` holds what is done; ``OUTPUT.part.json`` says which job it is of.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os

from ..utils.files import AnyPath, check_target, write_text
from ..utils.small_files import read_json


class PartialFile:
    """What is done of a job, on the disk. One process at a time may hold it.

    Each piece reaches the file before `append` returns: a kill costs at most the piece being written. Opening the same
    job again finds the complete pieces and cuts off a torn one.

    Args:
        path: the final name of the result; the part lies beside it.
        settings: what the result depends on, name -> value; a part of a job with other settings is refused.
        about: what else to write beside the settings, for people.
        name: where several share ``path``; it becomes part of the file's name.
        resume: False starts over.

    Attributes: target: where the result will lie.  part: the growing file.
    Raises: ValueError for other settings; OSError if ``path`` cannot be written.
    """

    def __init__(
        self, path: AnyPath, settings: dict[str, object], *, about: dict | None = None, name: str = "",
        resume: bool = True,
    ) -> None:
        self.target = check_target(path)
        self.part = self.target.with_name(f"{self.target.name}{f'.{name}' if name else ''}.part")
        self._about = self.part.with_name(f"{self.part.name}.json")
        self._size: int | None = None  # bytes of complete pieces; None while the file is not ours
        check_target(self.part)
        try:
            self._file = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise OSError(f"cannot write {path}: {error.strerror}; choose another place") from None
        try:
            self._lock()
            if resume and os.fstat(self._file).st_size:
                self._expect_settings(json.loads(json.dumps(settings)))
                self._size = self._read()
            else:
                self._size = 0
            self._cut()
            if not self._size:
                write_text(self._about, json.dumps({"settings": settings} | (about or {}), indent=2) + "\n",
                           follow=False)
        except BaseException:
            self.close()
            raise

    def _read(self) -> int:
        """Read the complete pieces from ``part``. Returns: the number of bytes they take."""
        raise NotImplementedError

    def append(self, piece: bytes) -> None:
        """Write a piece. Raises: OSError if the disk is full; earlier pieces stay whole."""
        rest = memoryview(piece)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            self._cut()
            raise OSError(f"cannot write {self.part}: {error.strerror}; make room for it") from None
        self._size += len(piece)

    def discard(self) -> None:
        """Nothing of it is kept."""
        self.part.unlink(missing_ok=True)
        self._about.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Let go of the file; what is in it can be gone on with. A part without any piece is removed."""
        if self._file is None:
            return
        if self._size:
            self._cut()
        elif self._size == 0:
            self.part.unlink(missing_ok=True)
            self._about.unlink(missing_ok=True)
        os.close(self._file)
        self._file = None

    def _lock(self) -> None:
        """The lock goes with the process, however it ends."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.part} is being written by another process; let it end, or write to another "
                             "file") from None
        except OSError:
            pass  # a file system without locks

    def _expect_settings(self, settings: dict) -> None:
        try:
            then = read_json(self._about)["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{self.part} is of an unknown job, since {self._about.name} is missing or damaged; "
                             "start over with --no-resume (resume=False)") from None
        differences = [f"{name} was {then.get(name)}, is {settings.get(name)}"
                       for name in (*settings, *(name for name in then if name not in settings))
                       if then.get(name) != settings.get(name)]
        if differences:
            raise ValueError(f"{self.part} is of a job with other settings: {'; '.join(differences)}; give those again "
                             "to go on with it, or start over with --no-resume (resume=False)")

    def _cut(self) -> None:
        """Drop what stands behind the complete pieces."""
        with contextlib.suppress(OSError):  # it is dropped when the part is read, at the latest
            os.ftruncate(self._file, self._size)
            os.lseek(self._file, self._size, os.SEEK_SET)
