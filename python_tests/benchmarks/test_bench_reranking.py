"""The benchmark of reranking: its systems give the same scores, and its counts are those of the design."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.slow


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

bench = pytest.importorskip("bench_reranking")


@pytest.fixture(scope="module")
def systems(tmp_path_factory):
    return bench.Systems(bench.SETTINGS["tiny"], "cpu", torch.float32, 1 << 26, tmp_path_factory.mktemp("bench"))


def test_all_systems_agree(systems):
    data = bench.make_pairs(systems.setting, 2.0)
    assert bench.check(systems, data) < 1e-5
    documents = {d for _, d in data.pairs}
    assert systems.cache.misses == len(documents) and systems.cache.hits > 0
    assert systems.disk_cache.tiers["disk"].hits == len(documents) and systems.disk_cache.misses == 0
    wrong = systems.plain
    systems.plain = lambda part: wrong(part) + 1
    with pytest.raises(ValueError, match="differ from the plain path's"):
        bench.check(systems, data)
    del systems.plain


def test_parts_are_the_whole_work_and_candidates_are_shared_as_asked():
    setting = bench.SETTINGS["small"]
    data = bench.make_pairs(setting, 2.0)
    assert len(data.pairs) == len(set(data.pairs)) == 5000
    assert 1.8 < 5000 / len({d for _, d in data.pairs}) <= 2.0
    for by_query in (False, True):
        parts = [data.part(r, setting.parts, by_query).pairs for r in range(setting.parts)]
        assert sorted(pair for part in parts for pair in part) == sorted(data.pairs)
    lengths = np.array([len(document.split()) for document in data.documents])
    assert 190 < lengths.mean() < 205 and 0.3 < lengths.std() / lengths.mean() < 0.4  # cut at 320


def test_token_counts(systems):
    data = bench.make_pairs(systems.setting, 1.0)
    counts, costs = bench.count_tokens(systems, data), bench.Costs.of(systems.model.lm)
    shape = systems.setting.shape
    layer = 4 * shape.width**2 + 3 * shape.width * shape.inner
    assert costs == bench.Costs(shape.layers * layer, 2 * shape.layers * shape.width, shape.width * shape.vocabulary)
    assert counts["cold"].tokens == counts["plain"].tokens  # nothing is shared
    assert counts["cold"].attended == counts["plain"].attended
    assert counts["warm"].tokens < counts["plain"].tokens / 2


def test_rows_have_the_strongest_baseline_of_each_work(systems):
    rows = bench.measure(systems, bench.make_pairs(systems.setting, 2.0), ["cached_torch", "plain"], only=1)
    baselines = {row["work"]: list(row["baselines_ms"]) for row in rows}
    both = ["cached_torch", "plain"]
    assert baselines == {"rerank_cold/tiny": both, "rerank_warm/tiny": both, "rerank_disk/tiny": ["plain"]}
    for row in rows:
        assert 0 < row["gemm_share"]["ours"] and 0 < row["ceiling"]
    assert rows[0]["token_bound"]["cached_torch"] == 1 < rows[1]["token_bound"]["plain"]
