"""The plans in benchmarks/ are plans."""

from pathlib import Path

import pytest

from qpeft_ext.compare.plan_file import read_plan

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PLANS = sorted(BENCHMARKS.rglob("*.yaml"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_plan_can_be_read(path):
    plan = read_plan(path)
    assert plan.collections and plan.methods
