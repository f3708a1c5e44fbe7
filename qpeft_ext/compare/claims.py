"""Several processes make the results of one folder: each result is made by one of them."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..utils.files import open_lock


@contextmanager
def claim(folder: Path, wait: bool) -> Iterator[bool]:
    """Whether this process may work in the folder of a result; without ``wait`` not while another one does.

    The claim goes with the process, however it ends. It is a lock on a hidden file beside the folder, which stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open_lock(folder.with_name(f".{folder.name}.lock")) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass  # a file system without locks
        yield True
