"""One valid file of every kind that the package reads, damaged at random: a right result, or exit 2 with one line.

    python python_tests/fuzz/files.py --count 5000 --seed 0     prints what failed; exit code 1 if something did
    python python_tests/fuzz/files.py --seed 0 --only 123 -v    one case again, with its output

Each case runs in a child of a process that has imported everything. It must end within 10 s of CPU time and 500 MB
above what the process had, without a traceback; with exit 2 it says why in one line of at most 300 characters, and
leaves no output. With exit 0 its result is finite, and that of the undamaged file where a cache or a part was damaged.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from fuzz.kinds import KINDS, Kind, arguments, make_whole, warm
from fuzz.mutations import damaged, put

from qpeft_ext import formats
from qpeft_ext.cli import main
from qpeft_ext.utils.text import one_line

CPU_SECONDS, WALL_SECONDS, MEGABYTES = 10, 100, 500


class Fuzz:
    """The undamaged job and its results, and a place where damaged copies of it are tried one after the other."""

    def __init__(self, folder: Path, kinds: list[Kind], verbose: bool = False) -> None:
        torch.set_num_threads(1)
        self.folder, self.verbose = folder, verbose
        self.job, self.whole, self.out = folder / "job", folder / "whole", folder / "out" / "result"
        self.out.parent.mkdir()
        os.environ["QPEFT_CACHE"] = str(self.job / "cache")
        make_whole(self.job)
        with open(folder / "log", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            warm(self.job, self.out, {kind.command for kind in kinds})
        shutil.copytree(self.job, self.whole, symlinks=True)
        gc.collect()
        gc.freeze()
        self.expected: dict[Kind, object] = {}

    def case(self, kind: Kind, draw: random.Random) -> str:
        """Damage a file and use it. Returns: what is wrong, "" if nothing is."""
        if kind not in self.expected:
            code, said, _ = self._run(kind, lambda: None)
            assert code == 0, f"{kind.file}: the undamaged file gives {code}: {said}"
            self.expected[kind] = self._result(kind)

        def damage() -> None:
            path = draw.choice(sorted(self.job.glob(kind.file)))
            put(path, damaged(path.read_bytes(), draw, path.name))

        code, said, megabytes = self._run(kind, damage)
        if self.verbose:
            print(f"exit {code}, {megabytes} MB\n{said}")
        lines = said.splitlines()
        if code not in (0, 2) or "Traceback" in said:
            return f"exit {code}: {(lines or [''])[-1][:200]}"
        if megabytes > MEGABYTES:
            return f"{megabytes} MB"
        if code == 2 and not (len(lines) == 1 and re.match(r"qpeft( \w+)?: error: ", said) and len(lines[0]) <= 300):
            return f"{len(lines)} lines: {' | '.join(line[:300] for line in lines)}"
        left = [path.name for path in self.out.parent.rglob("*") if code == 2 or path.name.endswith(".tmp")]
        if left:
            return f"left {left}"
        return self._compare(kind) if code == 0 else ""

    def _run(self, kind: Kind, damage: Callable[[], None]) -> tuple[int, str, int]:
        """Exit code (negative: the signal that ended it), stderr, megabytes above this process."""
        for folder in (self.job, self.out.parent):
            shutil.rmtree(folder, ignore_errors=True)
        self.job.mkdir()
        for part in self.whole.iterdir():
            if part.name in kind.parts:
                copy = shutil.copytree if part.is_dir() else shutil.copy2
                copy(part, self.job / part.name)
        self.out.parent.mkdir()
        damage()
        said = self.folder / "stderr"
        before = int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _limit(said)
                code = self._use(kind)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        deadline = time.monotonic() + WALL_SECONDS
        while True:
            done, status, usage = os.wait4(pid, os.WNOHANG)
            if done:
                break
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return -signal.SIGALRM, f"{said.read_text(errors='replace')}\nno end", 0
            time.sleep(0.002)
        megabytes = max(0, usage.ru_maxrss - before) // 1024
        return os.waitstatus_to_exitcode(status), said.read_text(encoding="utf-8", errors="replace"), megabytes

    def _use(self, kind: Kind) -> int:
        if isinstance(kind.command, str):
            return main(arguments(kind.command, self.job, self.out))
        try:
            kind.command(self.job, self.out)
        except (ValueError, TypeError, OSError) as error:
            print(one_line(f"qpeft: error: {error}"), file=sys.stderr)
            return 2
        return 0

    def _result(self, kind: Kind) -> object:
        """What came out: the values of a run or of JSON; texts as they are."""
        path = Path(kind.output.format(job=self.job, out=self.out))
        if not path.is_file():
            return None
        if not isinstance(kind.command, str):
            return path.read_text()
        if path.suffix == ".json":
            return json.loads(path.read_text(), parse_constant=lambda name: [name])
        return {query: dict(ranking) for query, ranking in formats.read_run(path).items()}

    def _compare(self, kind: Kind) -> str:
        expected, got = self.expected[kind], self._result(kind)
        if got is None:
            return "exit 0, and no result"
        if isinstance(kind.command, str) and not kind.output.endswith(".json"):
            if not all(math.isfinite(score) for ranking in got.values() for score in ranking.values()):
                return "a score that is not finite"
            if kind.exact and not _close(expected, got):
                return "another result"
        elif kind.exact and expected != got:
            return "another result"
        return ""


def _close(expected: dict, got: dict) -> bool:
    """Equal runs, up to what a batch of another shape changes."""
    return got.keys() == expected.keys() and all(
        got[query].keys() == ranking.keys() and all(abs(got[query][doc] - ranking[doc]) < 1e-3 for doc in ranking)
        for query, ranking in expected.items()
    )


def _limit(said: Path) -> None:
    """Redirect this child's standard streams, limit its CPU time and memory, and print a traceback if it is killed."""
    for number, path in ((0, os.devnull), (1, os.devnull), (2, said)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC if number == 2 else os.O_RDWR, 0o600), number)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False, errors="backslashreplace")
    faulthandler.enable(sys.stderr)
    used = int(sum(os.times()[:2]))
    resource.setrlimit(resource.RLIMIT_CPU, (used + CPU_SECONDS, used + CPU_SECONDS + 2))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (2 << 30), size + (2 << 30)))


def fuzz(count: int, seed: int, only: int | None = None, like: str = "", verbose: bool = False) -> dict[int, str]:
    """Try ``count`` cases. Returns: number of a case -> what is wrong with it."""
    kinds = [kind for kind in KINDS if re.search(like, kind.file)]
    wrong, tried = {}, Counter()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # thousands of copies need no disk
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        tries = Fuzz(Path(folder).resolve(), kinds, verbose)
        for i in range(count) if only is None else [only]:
            draw = random.Random(f"{seed}/{i}")
            kind = draw.choices(kinds, [kind.weight for kind in kinds])[0]
            tried[kind.file] += 1
            if problem := tries.case(kind, draw):
                wrong[i] = f"{kind.file}: {problem}"
                if __name__ == "__main__":
                    print(f"case {i}: {wrong[i]}", flush=True)
    if verbose:
        print(dict(tried))
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one case")
    parser.add_argument("--like", default="", help="files whose pattern matches this regular expression")
    parser.add_argument("-v", "--verbose", action="store_true")
    options = parser.parse_args()
    begin = time.monotonic()
    found = fuzz(options.count, options.seed, options.only, options.like, options.verbose)
    print(
        f"{options.count if options.only is None else 1} damaged files in {time.monotonic() - begin:.0f} s: "
        f"{len(found)} wrong"
    )
    sys.exit(bool(found))
