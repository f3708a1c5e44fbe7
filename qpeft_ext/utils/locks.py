"""`locked_folder`: a folder that one process at a time writes to."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold ``folder``, made if need be; it is removed at the end if nothing is in it.

    The lock is on the folder itself and goes with the process, however it ends.
    Raises: ValueError if another process holds it; OSError if it cannot be made.
    """
    file = _open_locked(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()
        os.close(file)


def _open_locked(folder: Path) -> int:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another process has removed it since
            file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                raise ValueError(
                    f"{folder} is being written by another process; let it end, or name another folder"
                ) from None
            except OSError:
                return file  # a file system without locks
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(folder)):
                    return file
            os.close(file)
