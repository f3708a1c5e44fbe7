"""`Job`: the pairs of one request, from the queue to their scores."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Hashable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..prompts.prompt import Document


@dataclass(eq=False)
class Job:
    """The pairs of one request, which are scored in one pass or in several, together with those of other requests.

    Attributes:
        served: the model, a `models.Served`.
        pairs: (query, document), B of them.
        digests: SHA-256 of each pair's document prefix.
        prefix_tokens, suffix_tokens: tokens of each pair's document prefix, and of the rest of its prompt.
        instruction: for the LM, or None.
        lists: for each pair the list of documents that it is ranked in, for models whose scores depend on it.
        future: gets the job itself when all pairs have scores, or an error; cancelled when nobody waits any more.
        scores: float32 [B], nats.
        cached: whether the prefix of each pair was not computed for it: it was in the cache, or in the pass already.
        pending: places of the pairs that are in no pass yet; short documents are at the end, which is taken first.
        arrived, started: `time.monotonic` when it came into the queue, and when its first pass began.
        inference_seconds: duration of the passes that it was in.
        size: tokens that were left of it when it was first considered for a pass.
    """

    served: Any
    pairs: list[tuple[str, Document]]
    digests: list[bytes]
    prefix_tokens: list[int]
    suffix_tokens: list[int]
    instruction: str | None = None
    lists: list[int] = field(default_factory=list)
    future: Future[Job] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    inference_seconds: float = 0.0
    size: int = 0

    def __post_init__(self) -> None:
        self.scores = np.full(len(self.pairs), np.nan, dtype=np.float32)
        self.cached = [False] * len(self.pairs)
        self.pending = sorted(range(len(self.pairs)), key=lambda place: -self.prefix_tokens[place])
        self.tokens = sum(self.prefix_tokens) + sum(self.suffix_tokens)

    @property
    def group(self) -> Hashable:
        """Equal for jobs that may share a pass."""
        return id(self.served)

    @property
    def whole(self) -> bool:
        """Tell whether its pairs must be scored in one call, because a score depends on all documents of the query."""
        return self.served.whole

    def cost(self, place: int, read: set[bytes]) -> int:
        """Count the tokens that a pair adds to a pass.

        Args:
            place: of the pair.
            read: digests of the prefixes that the pass reads anyway.
        """
        known = self.cached[place] or self.digests[place] in read
        return self.suffix_tokens[place] + (0 if known else self.prefix_tokens[place])

    @property
    def left(self) -> int:
        """Tokens of the pairs that are in no pass yet."""
        return sum(self.cost(place, set()) for place in self.pending)

    def finish(self) -> None:
        """Hand the job to the one who waits for it."""
        with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
            self.future.set_result(self)

    def fail(self, error: Exception) -> None:
        """Hand an error to the one who waits for it."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)
