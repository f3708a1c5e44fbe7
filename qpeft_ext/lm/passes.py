"""What a pass sets on the LM or on torch, and takes back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, RLock
from weakref import WeakKeyDictionary

from torch import nn

from .attention_backend import _cudnn_attention
from .lock import without_wrappers


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Inside, `scaled_dot_product_attention` does not take cuDNN's kernels; the user's setting comes back after.

    torch 2.11 and later prefer them on H100, H200 and B200. With an attention mask their backward returns NaN for some
    lengths (pytorch/pytorch issue 196678), and rows that attend to nothing, which left padding makes, may be NaN. With
    them a soft prompt or LoRA, whose gradient goes through left-padded prefixes, was NaN after 5 to 44 steps.

    The backward pass takes the kernel that belongs to the forward's. It is a setting of the process, as torch has no
    other: passes of several threads share it, and the last of them gives it back. Also a decorator.
    """
    with _cudnn_attention.inside():
        yield


_locks: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()  # beside the LM: a lock can't be copied or pickled


_of_locks = Lock()


def lm_lock(lm: nn.Module) -> RLock:
    """The lock of an LM, the same for all models around it; a thread that has it may take it again."""
    lm = without_wrappers(lm)
    with _of_locks:
        return _locks.setdefault(lm, RLock())
