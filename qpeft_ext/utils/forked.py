"""Keep a forked process from hanging: OpenMP would wait there for threads that the fork did not copy."""

from __future__ import annotations

import logging
import os

import torch

logger = logging.getLogger(__name__)

_computed_with_threads = False
_lost_threads = False


def computes_now() -> None:
    """Note that torch is about to compute on the CPU.

    In a process that was forked after its parent had computed with several threads, set torch to one thread, with a
    warning: with more it would hang at the first product of matrices.
    """
    global _computed_with_threads, _lost_threads
    if torch.get_num_threads() == 1:
        return
    if _lost_threads:
        _lost_threads = False
        torch.set_num_threads(1)
        logger.warning(
            "this process was forked from one that had computed with several threads, where OpenMP would "
            "hang: it computes with one thread; start processes by spawn, or load the model after the fork"
        )
    else:
        _computed_with_threads = True


def _after_fork() -> None:
    global _computed_with_threads, _lost_threads
    _lost_threads, _computed_with_threads = _lost_threads or _computed_with_threads, False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
