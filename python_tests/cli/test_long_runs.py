"""Long reranking runs: killed, interrupted, out of disk, on several devices; nothing is lost, repeated, left behind."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jobs.long_job import CANDIDATES, QUERIES, command, make_long_job
from jobs.processes import children, forked_command

from qpeft_ext import formats
from qpeft_ext.cli import main
from qpeft_ext.ranking import systems as rerank_systems
from qpeft_ext.ranking.run import PAIRS_PER_BLOCK

LINES = QUERIES * CANDIDATES
PER_BLOCK = PAIRS_PER_BLOCK // CANDIDATES  # queries


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return make_long_job(tmp_path_factory.mktemp("long"))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    os.environ["QPEFT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["QPEFT_CACHE"]


@pytest.fixture(scope="module")
def expected(job, tmp_path_factory):
    """The run of one process that nothing happens to."""
    path = tmp_path_factory.mktemp("expected") / "run"
    assert main(command(job, path)) == 0
    return path.read_bytes()


def whole_queries(part) -> int:
    """How many queries a part holds; it must be a run as it is, of whole blocks."""
    run = formats.read_run(part)
    assert len(run) % PER_BLOCK == 0
    assert all(len(ranking) == CANDIDATES for ranking in run.values())
    assert list(run) == [f"q{i}" for i in range(len(run))]
    return len(run)


def finish(job, out, expected, capsys, there, *options) -> None:
    """The same command again: it ranks only what is missing, and the run is what it would have been."""
    capsys.readouterr()
    assert main(command(job, out, *options)) == 0
    text = capsys.readouterr().out
    assert f"keeps {there} of {QUERIES} queries: going on from there" in text
    assert f"{QUERIES - there} queries, {(QUERIES - there) * CANDIDATES} pairs" in text
    assert out.read_bytes() == expected
    assert sorted(path.name for path in out.parent.iterdir()) == [out.name, f"{out.name}.json"]


def test_killed(job, expected, tmp_path, capsys):
    """SIGKILL; then a torn line, as a power cut would leave it."""
    out, part = tmp_path / "run", tmp_path / "run.part"
    process = forked_command(command(job, out))
    process.wait_for_size(part, 10_000)
    process.kill()
    assert process.end()[0] == -signal.SIGKILL and not out.exists()
    there = len(part.read_bytes().splitlines()) // CANDIDATES // PER_BLOCK * PER_BLOCK
    assert 0 < there < QUERIES
    lines = expected.splitlines(keepends=True)
    part.write_bytes(b"".join(lines[: there * CANDIDATES + 3]) + lines[there * CANDIDATES + 3][:9])
    sums = tmp_path / "run.part.sums"
    sums.write_bytes(sums.read_bytes()[: there // PER_BLOCK * 32])
    finish(job, out, expected, capsys, there)


def test_disk_full(job, expected, tmp_path, capsys):
    """The system refuses to let the file grow (RLIMIT_FSIZE: the same path as a full disk, without being root)."""
    out, part = tmp_path / "run", tmp_path / "run.part"
    limit = 30_001  # in the middle of a line, and of a block
    process = forked_command(command(job, out), room=limit)
    code, _, err = process.end()
    there = whole_queries(part)
    assert code == 2 and 0 < there < QUERIES
    assert err == (
        f"qpeft rerank: error: cannot write {part}: File too large; make room for it; {part} keeps {there} "
        f"of {QUERIES} queries: the same command goes on from there\n"
    )
    finish(job, out, expected, capsys, there)


def test_a_vanished_corpus(job, expected, tmp_path, capsys, monkeypatch):
    """While it runs (as a network file system does it), and before it is resumed."""

    def read(self, *place):
        seen.append(place)
        if len(seen) > 900:
            raise OSError(116, "Stale file handle")
        return real(self, *place)

    real, seen, out = formats.Corpus._read, [], tmp_path / "run"
    monkeypatch.setattr(formats.Corpus, "_read", read)
    assert main(command(job, out)) == 2
    there = whole_queries(tmp_path / "run.part")
    assert capsys.readouterr().err == (
        f"qpeft rerank: error: {job}/data/corpus.jsonl: Stale file handle: the corpus cannot be read any more; bring "
        f"it back; {out}.part keeps {there} of {QUERIES} queries: the same command goes on from there\n"
    )
    monkeypatch.undo()
    (job / "data" / "corpus.jsonl").rename(job / "data" / "gone")
    assert main(command(job, out)) == 2
    assert "no BEIR folder with corpus.jsonl" in capsys.readouterr().err
    (job / "data" / "gone").rename(job / "data" / "corpus.jsonl")
    finish(job, out, expected, capsys, there)


def test_another_job_does_not_go_on_with_it(job, tmp_path, capsys, monkeypatch):
    out, part = tmp_path / "run.gz", tmp_path / "run.gz.part"
    candidates = formats.read_run(job / "data" / "run.trec")
    interrupt_after(monkeypatch, 3)
    assert main(command(job, out)) == 130
    monkeypatch.undo()
    before = part.read_bytes()
    for options, difference in (
        (["--max-document-tokens", 5], "max_document_tokens was 256, is 5"),
        (["--deterministic"], "deterministic was False, is True"),
        (["--top-k", 3], "queries and candidates was "),
        (["--dtype", "bfloat16"], "dtype was None, is bfloat16"),
    ):
        capsys.readouterr()
        assert main(command(job, out, *options)) == 2
        err = capsys.readouterr().err
        assert (
            re.fullmatch(
                r"qpeft rerank: error: [^\n]+; give those again to resume it, or start over with "
                r"--no-resume \(resume=False\)\n",
                err,
            )
            and difference in err
        )
        assert part.read_bytes() == before
    with held_by_another_process(part):
        assert main(command(job, out)) == 2
        assert "run.gz.part is being written by another process" in capsys.readouterr().err
    assert main(command(job, out, "--no-resume", "--max-document-tokens", 5)) == 0
    assert "going on" not in capsys.readouterr().out
    assert list(formats.read_run(out)) == list(candidates) and not part.exists()
    about = json.loads((tmp_path / "run.gz.json").read_text())
    assert about["settings"]["max_document_tokens"] == 5 and "torch" in about["versions"]


def test_a_length_that_no_memory_holds(job, expected, tmp_path, capsys, monkeypatch, caplog):
    """In a line of checksums that was damaged."""
    out, sums = tmp_path / "run", tmp_path / "run.part.sums"
    interrupt_after(monkeypatch, 3)
    assert main(command(job, out)) == 130
    monkeypatch.undo()
    lines = sums.read_bytes().splitlines()
    assert len(lines) == 3
    sums.write_bytes(b"\n".join([*lines[:2], b"9" * 14 + lines[2][14:], b""]))
    capsys.readouterr()
    assert main(command(job, out)) == 0
    assert "was changed from line" in caplog.text and "going on" in capsys.readouterr().out
    assert out.read_bytes() == expected


@pytest.mark.parametrize("error", [RuntimeError, ValueError, OSError, None])
def test_an_interrupt_that_a_library_turned_into_an_error(job, tmp_path, capsys, monkeypatch, error):
    """As torch does while safetensors reads weights. Ctrl-C stays what it is: one line, and exit code 130."""

    def load(*_, **__):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            if error is None:
                raise
            raise error("could not determine the shape of object type 'torch.storage.UntypedStorage'") from None

    interrupt_after(monkeypatch, 3)
    assert main(command(job, tmp_path / "run")) == 130
    monkeypatch.undo()
    monkeypatch.setattr(rerank_systems.Systems, "__init__", load)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may have been started without
    try:
        capsys.readouterr()
        assert main(command(job, tmp_path / "run")) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == (
        f"qpeft rerank: error: interrupted; {tmp_path}/run.part keeps 48 of {QUERIES} "
        "queries: the same command goes on from there\n"
    )


def interrupt_after(monkeypatch, blocks: int) -> None:
    add, seen = formats.PartialRun.add, []

    def interrupted(self, *arguments):
        if len(seen) == blocks:
            raise KeyboardInterrupt
        seen.append(1)
        add(self, *arguments)

    monkeypatch.setattr(formats.PartialRun, "add", interrupted)


@contextlib.contextmanager
def held_by_another_process(part):
    program = f"""
import fcntl, time
file = open({str(part)!r}, "r+")
fcntl.flock(file, fcntl.LOCK_EX)
print(flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    process.stdout.readline()
    try:
        yield
    finally:
        process.kill()
        process.communicate()


# -- several devices -----------------------------------------------------------------------------------------------


def test_two_devices_one_dies(job, expected, tmp_path):
    """The run is that of one device, to the byte, although a worker is killed in the middle."""
    out = tmp_path / "run"
    process = forked_command(command(job, out, "--devices", "cpu,cpu"))
    process.wait_for_size(tmp_path / "run.part", 5_000)
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    code, out_text, err = process.end()
    assert code == 0, err
    assert err == (
        "the worker on cpu was ended by SIGKILL (the system does that when memory runs out); the others rank "
        "its queries\n"
    )
    assert f"{QUERIES} queries, {LINES} pairs" in out_text
    assert out.read_bytes() == expected


def test_a_device_that_is_not_there(job, tmp_path):
    """Torch without CUDA lacks what a worker calls first."""
    code, _, err = forked_command(command(job, tmp_path / "run", "--devices", "cuda:99,cpu")).end()
    assert code == 2 and err.startswith("qpeft rerank: error: the device 'cuda:99' cannot be used: "), err


def test_killed_on_two_devices(job, expected, tmp_path, capsys):
    """The workers end with the process that started them; one device goes on where two were."""
    out, part = tmp_path / "run", tmp_path / "run.part"
    process = forked_command(command(job, out, "--devices", "cpu,cpu"))
    process.wait_for_size(part, 5_000)
    workers = [*children(process.pid), *workers_of(process.pid)]
    assert len(workers) >= 3  # they, and the server of forks
    process.kill()
    process.end()
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in workers):
        assert time.monotonic() < deadline, "a worker outlives the process that started it"
        time.sleep(0.05)
    finish(job, out, expected, capsys, len(part.read_bytes().splitlines()) // CANDIDATES // PER_BLOCK * PER_BLOCK)


def send(pids: list[int], which: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, which)


def test_interrupted_on_two_devices(job, expected, tmp_path, capsys):
    """Ctrl-C with the first system finished and the second one under way: one line, and no worker is left."""
    for attempt in range(5):  # the job is short: it may end before the signal comes
        out = tmp_path / str(attempt) / "run"
        out.parent.mkdir()
        part = out.with_name("run.UPR.part")
        slow = ("--max-tokens-per-batch", "128")  # a pass for a few pairs: otherwise a fast machine is done too soon
        process = forked_command(command(job, out, "--upr", "--devices", "cpu,cpu", *slow))
        process.wait_for_size(out.with_name("run.part"), 1)  # the same workers make both systems
        workers = workers_of(process.pid)

        def a_little_further(workers=workers, part=part, out=out, pause=0.01 / 4**attempt) -> bool:
            """On a busy machine the rest could be done before this process runs again, on a fast one in the pause."""
            send(workers, signal.SIGCONT)
            time.sleep(pause)
            send(workers, signal.SIGSTOP)
            return part.exists() and part.stat().st_size or out.exists()

        process.wait_for(a_little_further)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
        send(workers, signal.SIGCONT)
        code, _, err = process.end()
        if code and part.exists():  # not so if both systems were done before the signal came
            break
    assert code == 130 and len(workers) == 2
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)
    there = whole_queries(part)
    assert err == (
        f"qpeft rerank: error: interrupted; {out}.part keeps {QUERIES} of {QUERIES} queries, {part} keeps "
        f"{there} of {QUERIES} queries: the same command goes on from there\n"
    )
    whole = out.with_name("run.part").read_bytes()
    assert main(command(job, out, "--upr")) == 0
    text = capsys.readouterr().out
    assert f"{QUERIES - there} queries, " in text and f"{there} queries were there already" in text
    assert out.read_bytes() == whole
    assert sorted(path.name for path in out.parent.iterdir()) == ["run", "run.json"]


def test_errors_of_workers(job, tmp_path, capsys):
    assert main(command(job, tmp_path / "run", "--devices", "cpu,tpu0")) == 2
    assert "the device 'tpu0' cannot be used" in capsys.readouterr().err
    assert not list(tmp_path.iterdir()) and not workers_of(os.getpid())


def workers_of(parent: int) -> list[int]:
    """The workers of a process: the children of its server of forks."""
    servers = [
        pid for pid in children(parent) if b"multiprocessing.forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return [worker for server in servers for worker in children(server)]
