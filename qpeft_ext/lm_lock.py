"""One thread at a time in an LM: what a pass sets on its modules (hooks, gates) the pass of another would see."""

from __future__ import annotations

from threading import Lock, RLock
from weakref import WeakKeyDictionary

from torch import nn

_locks: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()  # beside the LM: a lock can't be copied or pickled
_of_locks = Lock()


def lm_lock(lm: nn.Module) -> RLock:
    """The lock of an LM, the same for all models around it; a thread that holds it may take it again."""
    with _of_locks:
        return _locks.setdefault(lm, RLock())
