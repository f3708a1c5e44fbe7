"""`qpeft rerank --engine ray` on a local Ray with two workers, one of which is killed in the middle."""

import os
import signal
from pathlib import Path

import pytest
import torch
from jobs.long_job import command, make_long_job
from jobs.processes import Process

from qpeft_ext.cli import main

pytest.importorskip("ray.data", reason="ray is not installed: pip install 'qpeft_ext[ray]'")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return make_long_job(tmp_path_factory.mktemp("long"))


def actors(session: int) -> list[int]:
    """Ray's actors among the processes of a session: they rank."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            mine = int((process / "stat").read_text().rpartition(")")[2].split()[3]) == session
            if (
                mine
                and (process / "cmdline").read_bytes().startswith(b"ray::")
                and b"Map(_Actor)" in (process / "cmdline").read_bytes()
            ):
                found.append(int(process.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def test_a_killed_actor(job, tmp_path, monkeypatch):
    """The run is complete and that of one process, to the byte."""
    monkeypatch.setenv("QPEFT_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main(command(job, tmp_path / "expected")) == 0
    finally:
        torch.set_num_threads(threads)
    out = tmp_path / "run"
    process = Process(command(job, out, "--engine", "ray", "--devices", "cpu,cpu"))
    process.wait_for_size(tmp_path / "run.part", 1_000)
    victims = actors(process.pid)
    assert len(victims) == 2
    os.kill(victims[0], signal.SIGKILL)
    code, text, err = process.end()
    assert code == 0 and "rror" not in err, err
    assert "128 queries, 2048 pairs" in text
    assert out.read_bytes() == (tmp_path / "expected").read_bytes()
