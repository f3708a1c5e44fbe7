"""The benchmark of the variants: what it times is checked first, and a wrong result is not timed."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

bench = pytest.importorskip("bench_variants")
CPU = torch.device("cpu")


def test_every_variant_is_checked():
    case = bench.WORKS["tiny"](CPU)
    assert set(case.baselines) == {"without"}
    assert torch.isfinite(case.ours(None)).all() and not torch.equal(case.ours(None), case.baselines["without"](None))


@pytest.mark.parametrize("make", [
    bench.source_candidates(2, 3, False, D=16, V=100, length=8), bench.vocabulary(False, 16, 100),
    bench.vocabulary(True, 16, 100),
])  # fmt: skip
def test_a_wrong_result_is_an_error(make):
    case = make(CPU)
    right = case.ours(None)
    for baseline in case.baselines.values():
        assert case.error(right, baseline(None)) < 1e-5
    wrong = bench.Clues(right.embeds.roll(1, 1), right.mask) if isinstance(right, bench.Clues) else (right + 1) % 100
    with pytest.raises(AssertionError):
        for baseline in case.baselines.values():
            case.error(wrong, baseline(None))
