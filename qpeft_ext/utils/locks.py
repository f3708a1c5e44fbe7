"""Locks between processes. Each is on an open file or folder, so that it goes with its process, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO


def lock(file: int | IO[bytes], *, wait: bool = False, required: bool = False) -> bool:
    """Lock an open file or folder for this process.

    Args:
        wait: wait until no other process has the lock.
        required: a file system without locks is an OSError; else the file is used there without a lock.
    Returns: False if another process has the lock, True otherwise.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        if required:
            raise
    return True


def open_locked(path: Path, open_path: Callable[[], int], remedy: str) -> int:
    """Open and lock ``path``, which other processes may rename or remove meanwhile.

    Args:
        open_path: opens ``path``, which is made if need be, and returns its descriptor.
        remedy: the end of the message for a locked path, which says what to do.
    Returns: the descriptor.
    Raises: ValueError if another process has the lock; what ``open_path`` raises.
    """
    while True:
        file = open_path()
        if not lock(file):
            os.close(file)
            raise ValueError(f"{path} is being written by another process; {remedy}")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        os.close(file)  # another process renamed or removed it after it was opened here


def open_lock_file(path: Path, mode: int = 0o666) -> IO[bytes]:
    """Open a lock file, which is made if need be; its content is kept, and a link is refused.

    Raises: OSError that names ``path`` if it cannot be opened; ValueError if it is not a regular file.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    if path.is_symlink():
        raise ValueError(f"{path} is a link; expected a lock file of qpeft_ext: remove the link")
    file = os.fdopen(os.open(path, flags, mode), "r+b", buffering=0)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{path} is not a regular file; expected a lock file of qpeft_ext: remove it")
    return file


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Lock the folder itself, which is made if need be, and removed at the end if it is empty.

    Raises: ValueError if another process has it; OSError if it cannot be made.
    """

    def open_folder() -> int:
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another process has removed it since
                return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    file = open_locked(folder, open_folder, "let it end, or name another folder")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()
        os.close(file)


def lock_folder(folder: Path) -> IO[bytes]:
    """Lock a folder, through a hidden file in it, until the file that is returned is closed.

    Raises: ValueError if another process, or another object of this one, has it.
    """
    file = open_lock_file(folder / ".lock")
    if not lock(file, required=True):
        file.close()
        raise ValueError(f"{folder} is in use by another process, or by another cache of this one; name another folder")
    return file


@contextlib.contextmanager
def claim(folder: Path, wait: bool) -> Iterator[bool]:
    """Claim the work on a result, through a lock on a hidden file beside its folder; that file stays.

    Args:
        folder: where the result goes.
        wait: wait while another process has the claim.
    Yields: whether this process has the claim; always True with ``wait``.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open_lock_file(folder.with_name(f".{folder.name}.lock")) as file:
        yield lock(file, wait=wait)
