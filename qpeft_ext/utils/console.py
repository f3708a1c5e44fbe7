"""The standard streams of a command: work does not end because nobody reads what it prints any more."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class Stream:
    """A text stream whose first failing write ends the printing and nothing else.

    Attributes: error: of the first write that failed.
    """

    def __init__(self, stream: Any) -> None:
        self._stream, self.error = stream, None

    def write(self, text: str) -> int:
        if self.error is None:
            try:
                return self._stream.write(text)
            except OSError as error:
                self._end(error)
        return len(text)

    def flush(self) -> None:
        if self.error is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._end(error)

    def _end(self, error: OSError) -> None:
        self.error = error
        with contextlib.suppress(OSError, ValueError):  # what is in the buffer must go somewhere when Python ends
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def standard_streams() -> Iterator[Stream]:
    """`Stream`s in the place of ``sys.stdout`` (which is yielded) and ``sys.stderr``.

    A descriptor that is closed (``>&-``) is opened to nowhere first: else the next file would get its number, and what
    is printed would end up in it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))
    stdout, stderr = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Stream(stdout), Stream(stderr)
    try:
        yield sys.stdout
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = stdout, stderr


class Interrupted(Exception):
    """Ctrl-C, with what is left of the work in words."""


def is_first_process() -> bool:
    """False in all processes of torchrun but the first."""
    return os.environ.get("RANK", "0") == "0"


def say(message: object = "") -> None:
    """Print a line, or something of rich, on stdout; 100 columns wide where there is no terminal.

    Under torchrun the first process speaks for all.
    """
    if not is_first_process():
        return
    from rich.console import Console

    width = None if sys.stdout.isatty() else 100
    console = Console(file=sys.stdout, width=width, highlight=False, markup=False)
    console.print(message, soft_wrap=isinstance(message, str))
