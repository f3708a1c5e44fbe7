"""`benchmarks/bench_score_kinds.py`: its scores are the LM's, and works of equal length have equal tokens."""

import sys
from pathlib import Path

import pytest
import torch

import qpeft_ext as qpeft

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

pytestmark = pytest.mark.slow


def test_on_a_tiny_llama():
    bench, shapes = pytest.importorskip("bench_score_kinds"), pytest.importorskip("random_llama")
    device, cache = torch.device("cpu"), qpeft.DocumentCache(1 << 24)
    lm, tokenizer = bench.random_work(shapes.TINY, device)
    systems = {
        kind: bench.System(lm, tokenizer, kind, cache, **bench.LLAMA_WORDS.get(kind, {}))
        for kind in ("likelihood", "yes_no", "both")
    }
    pairs = bench.random_pairs(shapes.TINY, 2, 3)
    rows = {row["work"]: row for row in bench.measure(systems, pairs, 1, device, "tiny")}
    assert len(rows) == 4 and all(row["max_error"] < 1e-3 for row in rows.values())
    assert rows["score_kinds/tiny/yes_no/equal"]["tokens"] == 1
    question, query, asked = 4, shapes.TINY.query, 2
    assert rows["score_kinds/tiny/yes_no/default"]["tokens_per_pair"] == question + query + asked
    assert rows["score_kinds/tiny/yes_no/default"]["tokens"] == (question + query + asked) / (question + query - 1)
    wrong = systems["yes_no"].expected
    systems["yes_no"].expected = lambda *pair: wrong(*pair) + 0.01
    with pytest.raises(ValueError, match="yes_no: scores differ"):
        bench.check(systems, pairs)
