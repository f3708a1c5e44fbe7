"""`Service`: models, cache, queue and scoring thread of one server, from start to end."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from ..formats import open_collection
from ..prefixes.cache import DocumentCache
from ..prompts.prompt import Document
from .ask import Ask
from .auth import Keys
from .errors import RequestError, unexpected
from .job import Job
from .metrics import Metrics
from .models import Models
from .prepare import Prepared, prepare
from .scoring_thread import ScoringThread
from .settings import ServeSpec

logger = logging.getLogger(__name__)
LOADING = "qpeft-loading"  # name of the thread that loads models
_FRESH = 5.0  # seconds for which a pass proves that the model works
_PROBE_SECONDS = 15.0  # until the pass of a probe must be done
_LOOK_AT_INDEX = 5.0  # seconds between two looks at the files of the index


def running_pool(threads: int, name: str) -> ThreadPoolExecutor:
    """Make a pool whose threads run already."""
    pool, all_run = ThreadPoolExecutor(threads, name), threading.Barrier(threads)
    list(pool.map(lambda _: all_run.wait(), range(threads)))
    return pool


class Service:
    """All that a server needs besides HTTP.

    Args:
        spec: what is served.
    Attributes:
        keys, metrics, models: see there.
        pool: threads for what would keep the event loop waiting; they run before there are requests, since a thread
            cannot be started where memory is short.
        state_pool: one thread for `/ready` and other pages, so that they do not wait for the texts of requests.
        loading_pool: one thread that loads and forgets models, which takes long, and never two at a time.
        spans_pool: one thread for the spans of answers, which need the LM.
        error: why the models could not be loaded; None so far.
    Raises: ValueError or OSError for a cache, an index or a corpus that cannot be used.
    """

    def __init__(self, spec: ServeSpec) -> None:
        self.spec = spec
        disk, disk_bytes = spec.disk or (None, 0)
        self.cache = DocumentCache(
            spec.cache_bytes, disk=disk, disk_bytes=disk_bytes, index=spec.index, kv_dtype=spec.kv_dtype
        )
        self.models = Models(spec, self.cache)
        self.keys = Keys(spec.api_keys)
        self.metrics = Metrics(
            lambda: self.cache.tiers, lambda: (len(self.scoring.waiting), self.scoring.waiting.tokens)
        )
        self.scoring = ScoringThread(spec.limits, self.metrics, self._between_passes)
        self.pool = running_pool(4, "qpeft-prepare")
        self.state_pool = running_pool(1, "qpeft-state")
        self.loading_pool = running_pool(1, "qpeft-models")
        self.spans_pool = running_pool(1, "qpeft-spans")
        self.error: Exception | None = None
        self.stopping = False
        self.corpus: Mapping[str, Document] | None = None
        self._loaded = threading.Event()
        self._looked_at_index = time.monotonic()

    # -- life -----------------------------------------------------------------------------------------------------

    def start(self, on_failure: Callable[[], object] = lambda: None) -> None:
        """Load the models in a thread, and score one pair.

        Args:
            on_failure: called if that fails, when `error` is set.
        """
        threading.Thread(target=self._load, args=(on_failure,), name=LOADING, daemon=True).start()

    def _load(self, on_failure: Callable[[], object]) -> None:
        try:
            if self.spec.corpus is not None:
                self.corpus = open_collection(self.spec.corpus).corpus
            for name, adapter in self.spec.models.items():
                self.models.load(name, adapter)
            self.scoring.start()
            self._probe().future.result(None)
            self._loaded.set()
        except Exception as error:
            self.error = error
            on_failure()

    def wait_until_loaded(self, seconds: float) -> bool:
        """Wait until the models are loaded. Returns: whether they are."""
        return self._loaded.wait(seconds)

    def stop(self) -> None:
        """Take no more requests, score what waits, and end the threads."""
        self.stopping = True
        self.scoring.waiting.close()
        if self.scoring.is_alive():
            self.scoring.join()
        for pool in (self.pool, self.state_pool, self.loading_pool, self.spans_pool):
            pool.shutdown(wait=False)

    def _between_passes(self) -> None:
        """Take over an index that has grown."""
        now = time.monotonic()
        if self.cache.index is None or now - self._looked_at_index < _LOOK_AT_INDEX:
            return
        self._looked_at_index = now
        try:
            if self.cache.renew_index():
                logger.info("the index was opened again: %d documents", len(self.cache.index))
        except (ValueError, OSError) as error:
            logger.warning("the index has changed and cannot be read (%s); the old one is used", type(error).__name__)

    # -- requests -------------------------------------------------------------------------------------------------

    def submit(self, ask: Ask, given_up: threading.Event) -> Prepared:
        """Make the job of a request and put it into the queue; to be called in the pool.

        Args:
            given_up: set when nobody waits for the answer any more.
        Raises: RequestError if it cannot be scored, or need not be.
        """
        self.expect_loaded()
        prepared = prepare(ask, self.models, self.corpus, self.spec.limits)
        if given_up.is_set():
            raise RequestError("cancelled", "the client has gone")
        prepared.given_up = given_up
        self.scoring.put(prepared.job)
        return prepared

    def expect_loaded(self) -> None:
        """Raises: RequestError while the models load, and when the server stops."""
        if self.stopping:
            raise RequestError("not_ready", "the server is shutting down; send the request to another one")
        if not self._loaded.is_set():
            raise RequestError("not_ready", "the model is being loaded; try again in a few seconds", retry_after=5)

    # -- health ---------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """False if only a restart helps: the scoring thread has ended, or the models could not be loaded."""
        return self.error is None and (not self._loaded.is_set() or self.scoring.is_alive())

    async def why_not_ready(self) -> str:
        """Return "" if a pass succeeded a moment ago or does now, else a reason."""
        try:
            self.expect_loaded()
            if not self.scoring.is_alive():
                return "the scoring thread has ended"
            if self.scoring.healthy and time.monotonic() - self.scoring.last_success < _FRESH:
                return ""
            loop = asyncio.get_running_loop()
            job = await loop.run_in_executor(self.state_pool, self._probe)
            await asyncio.wait_for(asyncio.wrap_future(job.future), _PROBE_SECONDS)
        except TimeoutError:
            return f"no pass of the model within {_PROBE_SECONDS:.0f} s"
        except RequestError as error:
            return error.message
        except Exception as error:
            return unexpected(error).message
        return ""

    def _probe(self) -> Job:
        """Put a short pair into the queue."""
        ask = Ask("query", "documents", ["is it ready?"], ["A document that asks for nothing."], raw_scores=True)
        job = prepare(ask, self.models, None, self.spec.limits).job
        self.scoring.waiting.put(job)
        return job
