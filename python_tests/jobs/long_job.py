"""A reranking job of many blocks, and the command in a process of its own that can be killed; used by several tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from jobs.tiny_job import save_adapter, save_lm
from small_data import write_lines

import qpeft_ext as qpeft

QUERIES, CANDIDATES, DOCUMENTS = 128, 16, 60
WORDS = "tide moon sea boat harbour wind wave month earth low high pull rope lamp fog gull net pier map sail".split()


def make_long_job(folder: Path) -> Path:
    """Write ``data`` with ``run.trec``, ``lm`` and ``adapter`` into ``folder``: 8 blocks of 256 pairs."""

    def words(start: int, count: int) -> str:
        return " ".join(WORDS[(start * 7 + i * (1 + start % 5)) % len(WORDS)] for i in range(count))

    write_lines(
        folder / "data" / "corpus.jsonl",
        (f'{{"_id": "d{i}", "title": "", "text": "{words(i, 3 + i % 9)}"}}' for i in range(DOCUMENTS)),
    )
    write_lines(
        folder / "data" / "queries.jsonl",
        (f'{{"_id": "q{i}", "text": "{words(i, 2 + i % 3)}"}}' for i in range(QUERIES)),
    )
    write_lines(
        folder / "data" / "run.trec",
        (
            f"q{i} Q0 d{(i * 11 + 3 * rank) % DOCUMENTS} {rank} {-rank}.0 first"
            for i in range(QUERIES)
            for rank in range(CANDIDATES)
        ),
    )
    save_lm(folder / "lm")
    save_adapter(folder / "adapter", folder / "lm")
    return folder


def command(job: Path, output: Path, *options) -> list[str]:
    place = [] if "--devices" in options else ["--device", "cpu"]
    return [
        "rerank",
        "--model",
        str(job / "adapter"),
        "--data",
        str(job / "data"),
        "--run",
        str(job / "data" / "run.trec"),
        "--output",
        str(output),
        *place,
        *map(str, options),
    ]


def _hear_interrupts() -> None:
    """Let Ctrl-C end this process: a shell without job control makes those in its background ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Process:
    """The command as a process of its own, in a group of its own."""

    def __init__(self, arguments: list[str], **options) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.path.dirname(os.path.dirname(qpeft.__file__)),
            "OMP_NUM_THREADS": "1",
        }
        self.popen = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "qpeft_ext.cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
            **{"preexec_fn": _hear_interrupts} | options,
        )

    def wait_for(self, happened, seconds: float = 90) -> None:
        """Wait until ``happened()``; the process must be alive then."""
        deadline = time.monotonic() + seconds
        while not happened():
            if self.popen.poll() is not None:
                raise AssertionError(f"it ended too early: {self.popen.communicate()}")
            if time.monotonic() > deadline:
                self.popen.kill()
                raise AssertionError(f"it took too long: {self.popen.communicate()}")
            time.sleep(0.005)

    def wait_for_size(self, path: Path, size: int) -> None:
        self.wait_for(lambda: path.exists() and path.stat().st_size >= size)

    def end(self) -> tuple[int, str, str]:
        """Wait for the end; return exit code, stdout and stderr."""
        out, err = self.popen.communicate(timeout=90)
        return self.popen.returncode, out, err


def children(pid: int) -> list[int]:
    """Return the processes that ``pid`` has started and that are alive."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(stat.parent.name))
    return found
