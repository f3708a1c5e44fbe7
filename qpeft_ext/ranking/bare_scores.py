"""`BareScores`: scores of queries behind an empty document, kept between calls."""

from __future__ import annotations

from torch import Tensor

from ..lm.state import writes
from ..model import QPeftModel

BareKey = tuple[str, str | None]  # query, instruction


class BareScores:
    """The number of scored tokens and the bare score of queries, of one model as it is now.

    Nothing is kept of a model whose LM or trained modules have changed since, nor in a copy.
    """

    def __init__(self) -> None:
        self._made_of: tuple | None = None
        self._parameters: list[Tensor] = []  # kept, so that no other tensor can take an address
        self._known: dict[BareKey, tuple[int, float]] = {}

    def __reduce__(self) -> tuple:
        return BareScores, ()  # a version of an LM means nothing in another process

    def of(self, model: QPeftModel) -> dict[BareKey, tuple[int, float]]:
        """Return what is known of a model: a dict to be filled, the oldest first, which other threads share.

        Args:
            model: the reranker's.
        """
        with model.exclusive():
            parameters = [p for module in model.trained_modules.values() for p in module.parameters()]
            made_of = (model.engine.version(), *((p.data_ptr(), writes(p), p.dtype) for p in parameters))
            if made_of != self._made_of:
                self._made_of, self._parameters, self._known = made_of, [p.detach() for p in parameters], {}
            return self._known
