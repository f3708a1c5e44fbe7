"""State of torch, of the process or the thread, on which our computations must not depend.

Inside `own_state` there is no autocast, no other default dtype or device, and no inference mode, so that scores and
gradients are the same to the bit whatever the caller has set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any

import torch

_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


class SharedSetting:
    """A setting of the process that is changed while any thread is inside; the last to leave restores it.

    Args:
        read: returns the setting.
        write: changes the setting.
        value: the setting inside.
    """

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], None], value: Any) -> None:
        self._read, self._write, self._value = read, write, value
        self._lock = Lock()
        self._inside = 0
        self._before: Any = None

    def is_other(self) -> bool:
        """Return True if the setting differs from ours, or would without the threads that are inside."""
        with self._lock:
            return self._inside > 0 or self._read() != self._value

    @contextmanager
    def inside(self) -> Iterator[None]:
        with self._lock:
            if not self._inside:
                self._before = self._read()
                self._write(self._value)
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._write(self._before)


_default_dtype = SharedSetting(torch.get_default_dtype, torch.set_default_dtype, torch.float32)


@contextmanager
def own_state() -> Iterator[None]:
    """Turn off autocast and inference tensors, and make float32 and the CPU the defaults.

    Gradients are recorded if they were before, so not inside `torch.inference_mode`.
    """
    with ExitStack() as stack:
        for device in _AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if _default_dtype.is_other():
            stack.enter_context(_default_dtype.inside())
        yield


def refuse_backward_in_autocast(scores: torch.Tensor) -> torch.Tensor:
    """Return ``scores``; their backward pass inside `torch.autocast`, which rounds to 16 bits, is a ValueError."""
    if scores.requires_grad:
        scores.register_hook(_expect_no_autocast)
    return scores


def _expect_no_autocast(gradient: torch.Tensor) -> None:
    if torch.is_autocast_enabled(gradient.device.type):
        raise ValueError(
            "backward() was called inside torch.autocast, which would round the gradients to 16 bits; "
            "call it outside (the forward pass may be inside: it is never autocast)"
        )
