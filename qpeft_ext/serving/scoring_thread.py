"""`ScoringThread`: the one thread that runs the LM, pass after pass over the pairs of all requests that wait."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

import numpy as np
import torch

from ..prefixes.keys import PrefixKey
from ..prompts.prompt import Document
from ..ranking.reranker import Reranker
from ..utils.memory import is_out_of_memory, is_refused_kernel, return_freed_memory
from .errors import RequestError, unexpected
from .job import Job
from .settings import Limits
from .speed import Speed
from .waiting import Pass, WaitingJobs

logger = logging.getLogger(__name__)
_LOOK = 0.5  # seconds between two calls of `between` when nothing waits

Asked = list[tuple[str, Document, str | None]]  # query, document, instruction
Score = Callable[[], np.ndarray]


class Observer(Protocol):
    """One that is told about passes."""

    def passed(self, jobs: int, pairs: int, computed: int, cached: int, seconds: float) -> None:
        """Take note of a pass and of its tokens, computed and read from the cache."""

    def out_of_memory(self) -> None:
        """Take note that a pass did not fit in memory."""


class ScoringThread(threading.Thread):
    """Scores the jobs of a queue until it is closed and empty.

    Args:
        limits: of the server.
        observer: is told about passes.
        between: called between passes, by this thread.
    Attributes:
        waiting: the queue.
        speed: of the passes so far.
        healthy: False after a pass that failed for lack of memory, until one succeeds.
        last_success: `time.monotonic` of the last pass that succeeded.
    """

    def __init__(self, limits: Limits, observer: Observer, between: Callable[[], object] = lambda: None) -> None:
        super().__init__(name="qpeft-scoring", daemon=True)
        self.waiting = WaitingJobs(limits.max_queue_tokens, mark_cached)
        self.speed = Speed(limits.pass_seconds, limits.max_pass_tokens)
        self.healthy = True
        self.last_success = -float("inf")
        self._observer, self._between = observer, between

    def put(self, job: Job) -> None:
        """Add a job to the queue. Raises: RequestError if it is full, or the thread is gone."""
        if not self.is_alive():
            raise RequestError("not_ready", "the scoring thread has ended; restart the server")
        self.waiting.put(job, self.speed.tokens_per_second)

    def run(self) -> None:
        """Score until the queue is closed and empty; whoever waits gets an error if this thread fails."""
        try:
            while not self.waiting.closed_and_empty:
                self._between()
                chosen = self.waiting.take(self.speed.budget)
                if chosen:
                    self._score(chosen)
                else:
                    self.waiting.wait(_LOOK)
        except BaseException as error:
            logger.error("the scoring thread has ended: %s", type(error).__name__)
            logger.debug("why it has ended", exc_info=True)
        finally:
            self.waiting.close()
            self.waiting.drop_all(RequestError("not_ready", "the scoring thread has ended; restart the server"))

    def _score(self, chosen: Pass) -> None:
        """Score one pass; when it fails, each job by itself, so that one does not fail for another."""
        started = time.monotonic()
        for job in chosen:
            job.started = job.started or started
        try:
            computed, cached = self._count(chosen)
            score_pairs(chosen, self._observer.out_of_memory)
        except Exception as error:
            if len(chosen) > 1:
                for job, places in chosen.items():
                    self._score({job: places})
                return
            self._failed(next(iter(chosen)), error)
            return
        seconds = time.monotonic() - started
        self.healthy, self.last_success = True, time.monotonic()
        self.speed.measured(computed, seconds)
        self._observer.passed(len(chosen), sum(map(len, chosen.values())), computed, cached, seconds)
        for job in chosen:
            job.inference_seconds += seconds
            if not job.pending:
                job.finish()

    def _count(self, chosen: Pass) -> tuple[int, int]:
        """Mark which pairs find their document read; returns the tokens to compute, and those that need not be."""
        read: set[bytes] = set()
        computed = cached = 0
        for job, places in chosen.items():
            held = held_prefixes(job, places)
            for place, in_cache in zip(places, held, strict=True):
                job.cached[place] = in_cache or job.digests[place] in read
                read.add(job.digests[place])
                computed += job.suffix_tokens[place] + (0 if job.cached[place] else job.prefix_tokens[place])
                cached += job.prefix_tokens[place] if job.cached[place] else 0
        return computed, cached

    def _failed(self, job: Job, error: Exception) -> None:
        if is_out_of_memory(error):
            self.healthy = False
        job.fail(unexpected(error))


def score_pairs(chosen: Pass, out_of_memory: Callable[[], object]) -> None:
    """Fill in the scores of a pass, all of whose jobs have one model.

    Args:
        out_of_memory: called whenever the device runs out of memory.
    """
    served = next(iter(chosen)).served
    reranker, lacks = served.reranker, list[object]()
    budget = reranker.max_tokens_per_batch

    def lack() -> None:
        lacks.append(out_of_memory())

    try:
        if served.whole:
            for job, places in chosen.items():
                job.scores[places] = _as_a_whole(reranker, job, places, lack)
            return
        asked = [(*job.pairs[place], job.instruction) for job, places in chosen.items() for place in places]
        scores, start = _in_halves(reranker, asked, lack), 0
    finally:
        if lacks:  # the reranker's passes have shrunk to the smallest in vain; others need not stay so
            reranker.max_tokens_per_batch = budget
    for job, places in chosen.items():
        job.scores[places] = scores[start : start + len(places)]
        start += len(places)


def _as_a_whole(reranker: Reranker, job: Job, places: list[int], out_of_memory: Callable[[], object]) -> np.ndarray:
    """Score documents that depend on each other; again with an empty cache, if memory is short."""
    pairs, lists = [job.pairs[place] for place in places], [job.lists[place] for place in places]
    score = partial(reranker.score, pairs, lists, [job.instruction] * len(pairs))
    scores = _if_it_fits(reranker, score, True, out_of_memory)
    return _without_refused_kernels(score) if scores is None else scores


def _in_halves(reranker: Reranker, asked: Asked, out_of_memory: Callable[[], object]) -> np.ndarray:
    """Score pairs; in halves, and with an empty cache, if memory is short. Returns: float32 [B], nats."""
    pairs = [(query, document) for query, document, _ in asked]
    instructions = [instruction for _, _, instruction in asked]
    score = partial(reranker.score, pairs, instructions=instructions if any(instructions) else None)
    scores = _if_it_fits(reranker, score, len(asked) == 1, out_of_memory)
    if scores is not None:
        return scores
    half = (len(asked) + 1) // 2
    parts = [part for part in (asked[:half], asked[half:]) if part]
    return np.concatenate([_in_halves(reranker, part, out_of_memory) for part in parts])


def _if_it_fits(
    reranker: Reranker, score: Score, least: bool, out_of_memory: Callable[[], object]
) -> np.ndarray | None:
    """Score, or empty the cache.

    Args:
        score: does it.
        least: whether there is no smaller pass, so that nothing but an empty cache can help.
    Returns: the scores; None if memory is short.
    """
    try:
        return _without_refused_kernels(score)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        out_of_memory()
        if least and not (reranker.cache and len(reranker.cache)):
            raise
    # outside of the except clause, since the error keeps the tensors of the failed pass alive
    if reranker.cache is not None:
        reranker.cache.clear()
    return_freed_memory()
    return None


def _without_refused_kernels(score: Score) -> np.ndarray:
    """Score; without oneDNN, if it refuses a kernel."""
    try:
        return score()
    except RuntimeError as error:
        if not is_refused_kernel(error):
            raise
    with torch.backends.mkldnn.flags(enabled=False):  # else these pairs could not be scored until a restart
        return score()


def held_prefixes(job: Job, places: list[int]) -> list[bool]:
    """Tell for each of these pairs whether the cache has its document prefix."""
    reranker = job.served.reranker
    engine, cache = reranker.model.engine, reranker.cache
    if cache is None or engine.why_not_cached or engine.is_encoder_decoder:
        return [False] * len(places)
    version, alone = engine.version(), reranker.deterministic
    kv_dtype = engine.packing.other_dtype(cache.kv_dtype)
    return cache.held([PrefixKey(version, job.digests[i], job.prefix_tokens[i], alone, kv_dtype) for i in places])


def mark_cached(job: Job) -> None:
    """Mark the pairs whose document is in the cache when the job arrives, for the choice of passes."""
    job.cached = held_prefixes(job, list(range(len(job.pairs))))
