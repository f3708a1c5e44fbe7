"""The page ``/metrics`` for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from ..prefixes.tiers import Tier

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_TOKENS = tuple(4**n for n in range(2, 10))
_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Metrics:
    """Counters and histograms of one server.

    Args:
        tiers: gives the tiers of the cache by name.
        queue: gives the requests and the tokens that wait.
    """

    def __init__(self, tiers: Callable[[], dict[str, Tier]], queue: Callable[[], tuple[int, int]]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # process_resident_memory_bytes among others
        PlatformCollector(registry=self.registry)
        self.registry.register(_State(tiers, queue))
        r = self.registry
        self._requests = Counter("qpeft_requests", "Requests by route and status.", ["route", "status"], registry=r)
        self._failures = Counter("qpeft_request_failures", "Requests that failed, by reason.", ["reason"], registry=r)
        self._duration = _seconds("qpeft_request_seconds", "From the first byte to the answer.", r)
        self._queued = _seconds("qpeft_queue_seconds", "In the queue, before the first pass of a request.", r)
        self._inference = _seconds("qpeft_inference_seconds", "Passes that a request was in.", r)
        self._tokenization = _seconds("qpeft_tokenization_seconds", "Reading, cutting and counting a request.", r)
        self._documents = Histogram("qpeft_request_documents", "Documents of a request.", buckets=_COUNTS, registry=r)
        self._length = Histogram("qpeft_request_tokens", "Tokens of a request.", buckets=_TOKENS, registry=r)
        self._batch = Histogram("qpeft_batch_tokens", "Tokens that a pass computes.", buckets=_TOKENS, registry=r)
        self._batch_jobs = Histogram("qpeft_batch_requests", "Requests of a pass.", buckets=_COUNTS, registry=r)
        self._pairs = Counter("qpeft_pairs", "Pairs scored.", registry=r)
        self._computed = Counter("qpeft_tokens_computed", "Tokens that the LM has read.", registry=r)
        self._cached = Counter("qpeft_tokens_cached", "Tokens of documents that need not be read again.", registry=r)
        self._memory = Counter("qpeft_out_of_memory", "Passes repeated in parts for lack of memory.", registry=r)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count a response."""
        self._requests.labels(route, str(status)).inc()
        self._duration.observe(seconds)

    def failed(self, reason: str) -> None:
        """Count a request that could not be answered."""
        self._failures.labels(reason).inc()

    def scored(self, documents: int, tokens: int, tokenization: float, queued: float, inference: float) -> None:
        """Take note of a request that was scored; durations are in seconds."""
        self._documents.observe(documents)
        self._length.observe(tokens)
        self._tokenization.observe(tokenization)
        self._queued.observe(queued)
        self._inference.observe(inference)

    def passed(self, jobs: int, pairs: int, computed: int, cached: int, seconds: float) -> None:
        """Take note of a pass."""
        self._batch.observe(computed)
        self._batch_jobs.observe(jobs)
        self._pairs.inc(pairs)
        self._computed.inc(computed)
        self._cached.inc(cached)

    def out_of_memory(self) -> None:
        """Take note of a pass that did not fit in memory."""
        self._memory.inc()

    def page(self) -> bytes:
        """Return the page in Prometheus' text format."""
        return generate_latest(self.registry)


def one_page(pages: Mapping[str, str]) -> bytes:
    """Put the pages of replicas into one, where each sample has its replica's name as the label "replica"."""
    families: dict[str, Metric] = {}
    for name, page in pages.items():
        for family in text_string_to_metric_families(page):
            whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                whole.add_sample(sample.name, {**sample.labels, "replica": name}, sample.value)
    return generate_latest(SimpleNamespace(collect=families.values))


def _seconds(name: str, text: str, registry: CollectorRegistry) -> Histogram:
    return Histogram(name, f"{text} Seconds.", buckets=_SECONDS, registry=registry)


class _State(Collector):
    """The queue and the tiers of the cache, which are read when the page is asked for."""

    def __init__(self, tiers: Callable[[], dict[str, Tier]], queue: Callable[[], tuple[int, int]]) -> None:
        self._tiers, self._queue = tiers, queue

    def collect(self) -> Iterator[Metric]:
        """Yield the values of now."""
        jobs, tokens = self._queue()
        yield GaugeMetricFamily("qpeft_queue_requests", "Requests that wait.", value=jobs)
        yield GaugeMetricFamily("qpeft_queue_tokens", "Tokens of the requests that wait.", value=tokens)
        hits = CounterMetricFamily("qpeft_cache_hits", "Look-ups that found a document.", labels=["tier"])
        misses = CounterMetricFamily("qpeft_cache_misses", "Look-ups that did not.", labels=["tier"])
        used = GaugeMetricFamily("qpeft_cache_bytes", "Bytes of the documents in a tier.", labels=["tier"])
        budget = GaugeMetricFamily("qpeft_cache_max_bytes", "Budget of a tier; 0: none.", labels=["tier"])
        for name, tier in self._tiers().items():
            hits.add_metric([name], tier.hits)
            misses.add_metric([name], tier.misses)
            used.add_metric([name], tier.nbytes)
            budget.add_metric([name], tier.max_bytes)
        yield from (hits, misses, used, budget)
