"""Runs a hypothesis test as a script: more cases than the test suite has time for.

python python_tests/fuzz/NAME.py --count 10000 --seed 0
"""

from __future__ import annotations

import argparse
import time

import hypothesis


def run(*tests) -> None:
    """``--count`` cases of each test, which ``--seed`` determines. A failure is shown, and the exit code is 1."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    many = hypothesis.settings(max_examples=options.count, deadline=None, database=None, report_multiple_bugs=False,
                               suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
    for test in tests:
        begin = time.monotonic()
        hypothesis.seed(options.seed)(many(test))()
        print(f"{test.__name__}: {options.count} cases in {time.monotonic() - begin:.0f} s")
