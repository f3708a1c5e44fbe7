"""`Interrupts` knows whether Ctrl-C was pressed, even where a library turned it into another error."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupts:
    """Context manager in which Ctrl-C is remembered, and raises KeyboardInterrupt as usual.

    Libraries in C++ and Rust may turn the KeyboardInterrupt into an error that does not mention it. While safetensors
    reads weights, torch raises "could not determine the shape of object type 'torch.UntypedStorage'".
    """

    def __init__(self) -> None:
        self._came = False
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        in_main_thread = threading.current_thread() is threading.main_thread()  # others cannot have handlers
        if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._before = signal.signal(signal.SIGINT, self._remember)
        return self

    def __exit__(self, *_) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._came = True
        signal.default_int_handler(number, frame)

    def caused(self, error: BaseException | None) -> bool:
        """Return True if ``error`` was, or may have been, caused by Ctrl-C."""
        seen: set[int] = set()
        while error is not None and id(error) not in seen:
            if isinstance(error, KeyboardInterrupt):
                return True
            seen.add(id(error))
            error = error.__cause__ or error.__context__
        return self._came
