"""Indexes that are killed, resumed, damaged, or run out of disk."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from families.tiny import tiny_lm
from jobs.processes import Forked
from tiny_index import command, contents, corpus, error, make, model, scores

import qpeft_ext as qpeft
from qpeft_ext.cli import main
from qpeft_ext.engine.causal import CausalEngine
from qpeft_ext.prefixes import index_writer as index_run
from qpeft_ext.prefixes.index import PrefixIndex, shard_paths
from qpeft_ext.prefixes.index_writer import IndexWriter
from qpeft_ext.utils.files import AtomicWriter

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache_folder")]


def killed_at(monkeypatch, moment: str, occurrence: int) -> None:
    """Let this process die by SIGKILL at the given call, in the middle of writing where something is written."""
    seen = 0

    def now() -> bool:
        nonlocal seen
        seen += 1
        return seen == occurrence

    write, replace = AtomicWriter.write, os.replace

    def write_half(self, data):
        if now():
            write(self, bytes(data)[: len(data) // 2])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, data)

    def replace_and_die(source, target):
        replace(source, target)
        if now():
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(
        *((AtomicWriter, "write", write_half) if moment == "write" else (os, "replace", replace_and_die))
    )


@pytest.mark.parametrize(
    "moment, occurrence",
    [
        ("write", 1),
        ("replace", 1),  # the first manifest
        ("write", 3),
        ("replace", 2),
        ("write", 6),
        ("replace", 4),  # shards
        ("write", 14),
        ("replace", 8),  # the last manifest
    ],
)
def test_a_killed_run_goes_on(moment, occurrence, tmp_path, monkeypatch):
    """The result is that of a run that was not disturbed, bit by bit; no stored prefix is computed again."""
    lm, folder = model(), tmp_path / "index"
    make(tmp_path / "expected", lm, deterministic=True)

    def work() -> None:
        killed_at(monkeypatch, moment, occurrence)
        make(folder, lm, deterministic=True)

    assert Forked(work).end()[0] == -signal.SIGKILL
    there = len(contents(folder))
    if moment == "write" or occurrence < 8:
        with pytest.raises((ValueError, FileNotFoundError), match="is not complete|is no index"):
            PrefixIndex(folder)
    prefill, computed = CausalEngine.prefill, []
    monkeypatch.setattr(CausalEngine, "prefill", lambda self, group: computed.append(group) or prefill(self, group))
    assert make(folder, lm, deterministic=True).there == there
    assert len(computed) == 6 - there
    ours, expected = contents(folder), contents(tmp_path / "expected")
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)
    assert not list(folder.glob(".*.tmp")) and json.loads((folder / "manifest.json").read_text())["complete"]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [True, False], ids=["interrupted", "killed"])
def test_stopped_after_any_pass_the_files_are_those_of_one_run(kept, dtype, tmp_path, monkeypatch):
    """To the byte, though passes hold several documents: those that were stored already are computed along.

    An interrupt writes what is computed, in a shard that is filled up later; a kill loses it.
    """
    documents = {f"d{i}": ("", " ".join(["tide moon sea", "boat", "wind"][: 1 + i % 3]) + f" {i}") for i in range(14)}
    lm = model(tiny_lm("llama").to(dtype))
    options = {
        "documents": corpus(documents),
        "max_tokens_per_batch": 4 * 55,
        "shard_bytes": 3 * lm.engine.packing.numel(20) * dtype.itemsize,
    }
    make(tmp_path / "grown", lm, documents=corpus(dict(list(documents.items())[:3])))  # a run may begin with an index
    shutil.copytree(tmp_path / "grown", tmp_path / "expected")
    prefill, passes = CausalEngine.prefill, []
    monkeypatch.setattr(CausalEngine, "prefill", lambda self, group: passes.append(len(group)) or prefill(self, group))
    make(tmp_path / "expected", lm, **options)
    expected, count = files(tmp_path / "expected"), len(passes)
    assert count >= 3 and max(passes) > 1 and len(expected) > 4, passes
    for stop in range(1, count, 1 if dtype == torch.bfloat16 else 2):
        for again in (0, 1):  # stopped once, or twice
            folder = tmp_path / f"{stop}-{again}"
            shutil.copytree(tmp_path / "grown", folder)
            for number in (stop, again)[: 1 + again]:
                with stopped_at(monkeypatch, prefill, number, kept), contextlib.suppress(KeyboardInterrupt):
                    make(folder, lm, **options)
            make(folder, lm, **options)
            assert files(folder) == expected, (stop, again)


@contextlib.contextmanager
def stopped_at(monkeypatch, prefill, number: int, kept: bool):
    seen, stopped = [], []

    def stop(self, group):
        seen.append(group)
        if len(seen) > number:
            stopped.append(True)
            raise KeyboardInterrupt
        return prefill(self, group)

    write = IndexWriter._write_shard
    with monkeypatch.context() as patch:
        patch.setattr(CausalEngine, "prefill", stop)
        patch.setattr(IndexWriter, "_write_shard", lambda self: write(self) if kept or not stopped else None)
        yield


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:-70] + b"x" + b[-69:], lambda b: b""])
def test_a_damaged_shard_costs_its_documents_and_nothing_else(damage, tmp_path, caplog):
    lm = model()
    make(tmp_path, lm, deterministic=True)
    expected, whole = scores(lm, deterministic=True), contents(tmp_path)
    path = shard_paths(tmp_path)[2]
    path.write_bytes(damage(path.read_bytes()))
    cache = qpeft.DocumentCache(0, index=tmp_path)
    for _ in range(2):
        assert torch.equal(scores(lm, cache, deterministic=True), expected)
    assert (cache.hits, cache.misses) == (10, 2)
    assert [record.message.startswith(f"{path} is damaged") for record in caplog.records] == [True]  # said once
    assert "remove it and run the qpeft index command again" in caplog.text
    if not make(tmp_path, lm, deterministic=True).missing:  # damage inside a prefix is only seen when it is read
        path.unlink()
        assert make(tmp_path, lm, deterministic=True).missing == 1
    assert {name: flat.tolist() for name, flat in contents(tmp_path).items()} == {
        name: flat.tolist() for name, flat in whole.items()
    }
    assert qpeft.DocumentCache(0, index=tmp_path).index.manifest["complete"]


def test_a_shard_that_vanishes_while_it_is_used_is_a_miss(tmp_path, caplog):
    lm = model()
    make(tmp_path, lm)
    cache, expected = qpeft.DocumentCache(0, index=tmp_path), scores(lm)
    shard_paths(tmp_path)[0].unlink()
    torch.testing.assert_close(scores(lm, cache), expected, rtol=0, atol=1e-4)
    assert cache.misses >= 1 and "No such file" in caplog.text


def test_ctrl_c_keeps_what_was_computed_and_says_how_to_go_on(job, tmp_path, capsys, monkeypatch):
    prefill, calls = CausalEngine.prefill, []

    def interrupted(self, group):
        calls.append(group)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return prefill(self, group)

    monkeypatch.setattr(CausalEngine, "prefill", interrupted)
    arguments = [
        "index",
        str(job / "data"),
        "--out",
        str(tmp_path / "index"),
        "--base-model",
        str(job / "lm"),
        "--deterministic",
    ]
    assert main(arguments) == 130
    assert capsys.readouterr().err == (
        "qpeft index: error: interrupted; what was computed is kept, and the same command goes on from there\n"
    )
    assert len(contents(tmp_path / "index")) == 3
    monkeypatch.undo()
    monkeypatch.setenv("QPEFT_CACHE", str(tmp_path / "cache"))
    assert "3 of them are there already; 3 to compute" in command(capsys, *arguments)


def test_an_index_that_does_not_fit_is_refused_with_the_figures(job, tmp_path, capsys, monkeypatch):
    class Usage:
        free = 1000

    monkeypatch.setattr(index_run.shutil, "disk_usage", lambda _: Usage)
    said = error(capsys, "index", job / "data", "--out", tmp_path / "index", "--base-model", job / "lm")
    assert re.search(r"the index needs \d+\.\d kB more, but .* has 1\.0 kB free", said)
    assert not shard_paths(tmp_path / "index")


def test_a_disk_that_fills_up_ends_the_run_with_one_line(job, tmp_path, capsys, monkeypatch):
    write = AtomicWriter.write

    def full(self, data):
        if self.path.name.startswith("shard"):
            raise OSError(28, "No space left on device")
        write(self, data)

    monkeypatch.setattr(AtomicWriter, "write", full)
    said = error(capsys, "index", job / "data", "--out", tmp_path / "index", "--base-model", job / "lm")
    assert "No space left on device; make room and run the same command again" in said
