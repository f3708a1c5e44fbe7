"""A handful of the interruptions that `make kills` makes by the thousand."""

import subprocess
import sys
from pathlib import Path


def test_killed_at_random_moments():
    script = Path(__file__).parent / "kill_many.py"
    options = ["--count", "4", "--only", "rerank .gz bfloat16"]
    done = subprocess.run([sys.executable, "-W", "ignore", str(script), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.rstrip().endswith("0 failed")
