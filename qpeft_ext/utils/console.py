"""The standard streams of a command, whose work goes on when nobody reads its output any more."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, cast


class Stream:
    """A text stream that stays silent after its first failing write, instead of raising an error.

    Attributes: error: the error of that write; None before.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: OSError | None = None

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
        with contextlib.suppress(OSError, ValueError):  # Python flushes the buffer at its end
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def standard_streams() -> Iterator[Stream]:
    """Replace ``sys.stdout``, which is yielded, and ``sys.stderr`` by `Stream`s.

    A closed descriptor (``>&-``) is first opened to the null device: otherwise the next file that is opened would get
    its number, and output would be printed into that file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
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
    """Ctrl-C, with a message that says what is kept and how to resume."""


def is_first_process() -> bool:
    """Return False in every process of torchrun except the first."""
    return os.environ.get("RANK", "0") == "0"


def say(message: object = "") -> None:
    """Print a line or an object of rich on stdout, 100 columns wide where there is no terminal.

    What needs more columns gets them, since rich would cut numbers. Under torchrun only the first process prints.
    """
    if not is_first_process():
        return
    from rich.console import Console
    from rich.measure import Measurement

    width = None if sys.stdout.isatty() else 100
    console = Console(file=sys.stdout, width=width, highlight=False, markup=False)
    if not isinstance(message, str):
        unlimited = console.options.update(max_width=1 << 16)
        console.width = max(console.width, Measurement.get(console, unlimited, cast(Any, message)).minimum)
    console.print(message, soft_wrap=isinstance(message, str))
