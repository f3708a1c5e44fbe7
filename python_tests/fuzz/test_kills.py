"""A handful of the interruptions that `make kills` makes by the thousand."""

import pytest
from fuzz.kill_many import main
from jobs.processes import Forked

pytestmark = pytest.mark.slow


def test_killed_at_random_moments():
    process = Forked(lambda: main(["--count", "4", "--only", "rerank .gz bfloat16"]), seconds=600)
    code, out, err = process.end()
    assert code == 0, out[-3000:] + err[-3000:]
    assert out.rstrip().endswith("0 failed")
