"""Models around one LM take turns: a pass of one thread begins when that of another has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from threading import local
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

from ..lm.passes import lm_lock
from ..utils.forked import computes_now
from ..utils.torch_state import own_state
from .base import BaseEngine, LMParts

_Model = TypeVar("_Model", bound="TurnTaking")
_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")

_this_thread = local()


def in_passes(
    method: Callable[Concatenate[_Model, _Given], _Result],
) -> Callable[Concatenate[_Model, _Given], _Result]:
    """Decorate a method that runs the LM or the trained modules: it runs inside `TurnTaking.passes`."""

    @wraps(method)
    def run(self: _Model, *args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        with self.passes():
            return method(self, *args, **kwargs)

    return run


class TurnTaking(nn.Module):
    """A model that runs an LM inside `passes` only; the base of `ScoringModel`.

    Attributes:
        lm: the language model.
        engine: runs the LM on prefixes and suffixes.
    """

    lm: nn.Module
    engine: BaseEngine[Any, Any]
    _lm_parts: LMParts

    def _probed_engine(self) -> BaseEngine[Any, Any]:
        """Make an engine for the LM as it is now, and remember the parts that it was made for."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Device of the LM's embeddings."""
        return self.engine.device

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep all other threads from running a pass of this LM while the context is entered.

        This holds for every model and reranker around the LM. It is for a thread that changes the LM while others rank.
        That thread may use the model inside, but on a GPU the backward pass belongs outside: with
        ``suffix_micro_batch`` it runs in another thread of torch, which would wait forever.
        """
        with lm_lock(self.lm):
            yield

    @contextmanager
    def passes(self, evaluating: bool = False) -> Iterator[None]:
        """Enter the context in which the LM and the trained modules run.

        Inside, other threads wait with their passes, torch has the state that our passes need (`own_state`), and the
        engine fits the LM as it is now. Contexts may be nested.

        Args:
            evaluating: whether eval mode is set inside, whatever the mode outside is.
        """
        inside = getattr(_this_thread, "models", ())  # ids of the models whose context this thread has entered
        if id(self) in inside and not (evaluating and self.training):
            yield
            return
        with lm_lock(self.lm), own_state():
            computes_now()
            if self.lm.training:
                self.train(self.training)
            if (parts := self.engine.lm_parts()) != self._lm_parts:
                parts.expect_rows_of(self._lm_parts)
                compiled = self.engine.is_compiled
                self.engine = self._probed_engine()
                if compiled:
                    self.engine.compile()
            training = self.training
            try:
                if evaluating and training:
                    self.eval()
                _this_thread.models = (*inside, id(self))
                yield
            finally:
                _this_thread.models = inside
                if self.training != training:
                    self.train(training)
