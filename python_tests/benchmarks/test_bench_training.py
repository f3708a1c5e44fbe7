"""The benchmark of a training step: its orders of computation give the same loss and gradient."""

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

bench = pytest.importorskip("bench_training")


@pytest.mark.parametrize("clues", ["attention", "top_k"])
def test_baselines_compute_the_same_and_keep_more(clues):
    step = bench.Step.random(bench.TINY, clues=clues)
    assert len(step.batch) == 32
    expected = step.plain_distinct(), step.gradient()
    assert float(expected[1].norm()) > 0
    for function in (
        step.ours,
        step.ours_cached,
        step.ours_cached,
        step.ours_in_micro_batches,
        step.cached_torch,
        step.cached_torch_again,
        step.official,
        step.plain_distinct_one_graph,
    ):
        assert bench.error(step, function, expected) < 1e-5, function.__name__
    assert step.cache.hits == bench.DOCUMENTS
    saved = bench.measure_saved(step)
    assert saved["ours"]["one_graph"] < saved["plain_distinct_one_graph"] / 2
    assert saved["ours"]["micro_batches_of_8"] < saved["official_micro_batch_of_4"]


def test_the_bound_is_that_of_the_design():
    assert bench.token_passes([212] * 8, [40] * 4) == {
        "official": 28224,
        "plain_distinct": 16128,
        "first_epoch": 4256,
        "cached": 2560,
    }


def test_lengths_are_those_of_the_shape():
    step = bench.Step.random(bench.TINY)
    assert step.lengths == ([bench.TINY.prefix] * 8, [bench.TINY.suffix] * 4)
    lm, rows = step.model.lm, 32 * bench.TINY.query
    weights = sum(p.numel() for name, p in lm.model.layers.named_parameters() if p.dim() == 2)
    assert bench.product_flops(step, 100) == 2 * (100 * weights + 2 * rows * lm.lm_head.weight.numel())
