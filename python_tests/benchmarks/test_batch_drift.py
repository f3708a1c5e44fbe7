"""Random batches, caches and threads against the same pairs, unpadded: a small version of the benchmark."""

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

bench = pytest.importorskip("bench_batch_drift")


@pytest.fixture(autouse=True)
def few_texts(monkeypatch):
    queries, documents = bench.make_texts()
    monkeypatch.setattr(bench, "make_texts", lambda: (queries[:3], documents[:6]))


@pytest.mark.parametrize(("lm", "clues"), [("llama", "attention"), ("gemma3", "top_k+generated")])
def test_a_score_does_not_depend_on_batch_cache_or_threads(lm, clues):
    """`measure` raises for a difference of more than 1e-5 nats a query token."""
    batches, threads = bench.measure([lm], ["float32"], [clues], batches=20)
    assert batches["pairs"] > 100 and threads["pairs"] > 100
    assert set(batches["max_error_by_cache"]) == set(threads["max_error_by_cache"]) == {"none", "memory", "disk"}
    assert batches["spread"] > 0.1  # the documents matter


def test_a_difference_is_an_error(monkeypatch):
    score = bench.Drift.of_batch
    monkeypatch.setattr(bench.Drift, "of_batch", lambda self, *arguments: score(self, *arguments) + 2e-5)
    with pytest.raises(ValueError, match="batch_drift/gpt2/float32/none/batches: a score differs by"):
        list(bench.measure(["gpt2"], ["float32"], ["none"], batches=3))
