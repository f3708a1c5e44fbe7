"""A run that was cut anywhere is resumed to the bytes of the uninterrupted one; what was changed in it is noticed."""

import contextlib
import functools
import itertools
import os
import random

import numpy as np
import pytest
import torch
from families.tiny import tiny_lm, tiny_tokenizer

import qpeft_ext as qpeft
from qpeft_ext import formats
from qpeft_ext.ranking import run as rerank_run
from qpeft_ext.ranking.run import RankedBlock, by_likelihood, run_blocks

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

WORDS = "tide moon sea boat harbour wind wave month earth low high pull rope lamp fog gull net pier map sail".split()
DOCUMENTS = {f"d{i}": {"text": " ".join(random.Random(i).choices(WORDS, k=1 + i * 7 % 23))} for i in range(15)}
QUERIES = {f"q{i}": " ".join(random.Random(-i).choices(WORDS, k=1 + i % 4)) for i in range(7)}
RUN = {
    query_id: [(f"d{(i * 4 + 3 * j) % 15}", -float(j)) for j in range(1 + i % 4)] for i, query_id in enumerate(QUERIES)
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(rerank_run, "PAIRS_PER_BLOCK", 6)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # thousands of runs


def partial_run(path, **options) -> formats.PartialRun:
    return formats.PartialRun(path, RUN, {"of": "this job"}, blocks=run_blocks(RUN), **options)


def invented(seen: list):
    """An engine whose scores depend on the whole block, as rounding does; ``seen``: the queries it was asked for."""

    def engine(blocks):
        for block in blocks:
            seen.extend(block.query_ids)
            draw = random.Random(repr(block))
            yield RankedBlock(
                [
                    sorted(enumerate(draw.uniform(-99, 0) for _ in ids), key=lambda pair: -pair[1])
                    for ids in block.doc_ids
                ]
            )

    return engine


def rank(path, seen=None, **options) -> bytes:
    """The run, from what is there of it; what is in its file."""
    partial = partial_run(path, **options)
    try:
        engine = invented([] if seen is None else seen)
        rerank_run.rerank_blocks(engine, QUERIES, RUN, partial=partial, show_progress_bar=False)
        partial.finish()
    finally:
        partial.close()
    return path.read_bytes()


@pytest.fixture
def whole(tmp_path):
    """(run, its checksums, what is beside it): the files of an uninterrupted job before it ends."""
    partial = partial_run(tmp_path / "whole")
    rerank_run.rerank_blocks(invented([]), QUERIES, RUN, partial=partial, show_progress_bar=False)
    files = [(tmp_path / f"whole.part{ending}").read_bytes() for ending in ("", ".sums", ".json")]
    partial.discard()
    assert not list(tmp_path.iterdir())
    return files


def leave(path, part: bytes, sums: bytes | None, about: bytes) -> None:
    for ending, data in (("", part), (".sums", sums), (".json", about)):
        if data is not None:
            path.with_name(f"{path.name}.part{ending}").write_bytes(data)


@pytest.mark.parametrize("name", ["run", "run.gz"])
def test_cut_at_any_byte(whole, tmp_path, name, caplog):
    """A piece and its checksum are written one after the other: each byte of both may be the last one."""
    part, sums, about = whole
    expected = rank(tmp_path / f"expected{name}")
    sizes = [int(line.split()[0]) for line in sums.splitlines()]
    assert len(sizes) == 3 and sum(sizes) == len(part)
    cuts = [(size, done * 32) for done in range(3) for size in range(sum(sizes[:done]), sum(sizes[: done + 1]) + 1)]
    cuts += [(sum(sizes[: byte // 32 + 1]), byte) for byte in range(len(sums))]
    blocks, out = run_blocks(RUN), tmp_path / name
    for cut in cuts if name == "run" else cuts[::7]:
        leave(out, part[: cut[0]], sums[: cut[1]], about)
        seen = []
        assert rank(out, seen) == expected, cut
        assert seen == sum(blocks[cut[1] // 32 :], []), cut
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
            [f"expected{name}", f"expected{name}.json", name, f"{name}.json"]
        )
        out.unlink()
    assert not caplog.records


@pytest.mark.parametrize("dropped", range(3), ids=["first block", "second", "last"])
def test_cut_where_a_threshold_leaves_documents_out(tmp_path, dropped, caplog):
    """Any block may keep no document at all; the expected lines are made here, not by the code under test."""
    blocks, out = run_blocks(RUN), tmp_path / "run"
    assert len(blocks) == 3

    def kept(query_ids):  # every other candidate, none in one block
        return [
            [(place, -1.0 - place) for place in range(0, len(RUN[query_id]), 2) if query_ids != blocks[dropped]]
            for query_id in query_ids
        ]

    expected = "".join(
        f"{query_id} Q0 {RUN[query_id][place][0]} {rank} {score} qpeft_ext\n"
        for block in blocks
        for query_id, ranking in zip(block, kept(block), strict=True)
        for rank, (place, score) in enumerate(ranking, start=1)
    ).encode()
    for done in range(4):
        for torn in (b"", b"q0 Q0 d"):  # a kill in the middle of a write
            seen: list[str] = []

            def engine(given, last=3, seen=seen):
                for block in itertools.islice(given, last):
                    seen.extend(block.query_ids)
                    yield RankedBlock(kept(block.query_ids))

            with contextlib.closing(partial_run(out, complete=False)) as partial, contextlib.suppress(ValueError):
                stopped = functools.partial(engine, last=done)
                rerank_run.rerank_blocks(stopped, QUERIES, RUN, partial=partial, show_progress_bar=False)
            if done and torn:
                with open(f"{out}.part", "ab") as file:
                    file.write(torn)
            assert seen == sum(blocks[:done], [])
            with contextlib.closing(partial_run(out, complete=False)) as partial:
                result = rerank_run.rerank_blocks(engine, QUERIES, RUN, partial=partial, show_progress_bar=False)
                assert result.num_resumed == sum(map(len, blocks[:done]))
                partial.finish()
            assert seen == list(RUN) and list(result.run) == list(RUN)
            assert out.read_bytes() == expected
            assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.json"]
            out.unlink()
    assert not caplog.records


def test_a_part_of_an_earlier_version_is_resumed(whole, tmp_path):
    """It has no checksums: whole blocks are found by what a run of this job must look like."""
    part, _, about = whole
    expected, out = rank(tmp_path / "expected"), tmp_path / "run"
    blocks = run_blocks(RUN)
    ends = np.cumsum([sum(part.count(f"{query_id} Q0".encode()) for query_id in block) for block in blocks])
    lines = part.splitlines(keepends=True)
    for count in range(len(lines) + 1):
        for more in (b"", lines[count][:9] if count < len(lines) else b""):
            leave(out, b"".join(lines[:count]) + more, None, about)
            seen = []
            assert rank(out, seen) == expected
            assert seen == sum(blocks[int((ends <= count).sum()) :], [])


@pytest.mark.parametrize("change", ["score", "digit", "nan", "document", "swapped", "line", "sums"])
def test_what_was_changed_is_made_again(whole, tmp_path, change, caplog):
    part, sums, about = whole
    expected, out = rank(tmp_path / "expected"), tmp_path / "run"
    lines = part.splitlines(keepends=True)
    place = 8  # in the second block
    columns = lines[place].split(b" ")
    if change == "score":
        columns[4] = b"-1.0"
    elif change == "digit":
        columns[4] = columns[4][:-1] + (b"1" if columns[4][-1:] != b"1" else b"2")
    elif change == "nan":
        columns[4] = b"nan"
    elif change == "document":
        columns[2] = b"d99"
    elif change == "sums":
        sums = sums[:40] + bytes([sums[40] ^ 1]) + sums[41:]
    lines[place] = b" ".join(columns)
    if change == "swapped":
        lines[place : place + 2] = lines[place + 1], lines[place]
    elif change == "line":
        del lines[place]
    leave(out, b"".join(lines), sums, about)
    seen = []
    assert rank(out, seen) == expected
    assert seen == sum(run_blocks(RUN)[1:], [])
    first = 1 + sum(len(RUN[query_id]) for query_id in run_blocks(RUN)[0])
    assert [record.message for record in caplog.records] == [
        f"{out}.part was changed from line {first} on since it was written: those lines are dropped and made again"
    ]


def test_a_score_that_is_not_finite_in_a_part_without_checksums(whole, tmp_path):
    part, _, about = whole
    expected, out = rank(tmp_path / "expected"), tmp_path / "run"
    for wrong in (b"nan", b"inf", b"-inf", b"1e39", b"1_0", b"x"):
        lines = part.splitlines(keepends=True)
        lines[1] = b" ".join([*lines[1].split(b" ")[:4], wrong, *lines[1].split(b" ")[5:]])
        leave(out, b"".join(lines), None, about)
        assert rank(out) == expected


def test_a_full_disk_leaves_whole_blocks(whole, tmp_path, monkeypatch):
    """The system takes only some bytes of a write, of the piece or of its checksum, and then none."""
    expected, out = rank(tmp_path / "expected"), tmp_path / "run"
    write = os.write
    for room in range(0, len(whole[0]) + len(whole[1]), 17):
        left = room

        def some(file, data):
            nonlocal left
            if not left:
                raise OSError(28, "No space left on device")
            count = write(file, data[: min(left, 50)])
            left -= count
            return count

        monkeypatch.setattr(os, "write", some)
        with pytest.raises(OSError, match=f"cannot write {out}.part: No space left on device"):
            rank(out)
        monkeypatch.setattr(os, "write", write)
        assert rank(out) == expected


def test_a_process_that_waited_while_another_finished(tmp_path, monkeypatch):
    """It has opened the part before the other one gave it its name: it must not write into the result."""
    from qpeft_ext.utils import locks

    out = tmp_path / "run"
    first, real = partial_run(out), locks.fcntl.flock

    def late(file, how):
        monkeypatch.setattr(locks.fcntl, "flock", real)
        rerank_run.rerank_blocks(invented([]), QUERIES, RUN, partial=first, show_progress_bar=False)
        first.finish()
        real(file, how)

    monkeypatch.setattr(locks.fcntl, "flock", late)
    second = partial_run(out, resume=False)
    result = out.read_bytes()
    assert result and second.num_resumed == 0
    with pytest.raises(ValueError, match="is being written by another process"):
        partial_run(out)
    second.close()
    assert out.read_bytes() == result and len(list(tmp_path.iterdir())) == 2


GROWING = {f"g{i}": {"text": " ".join(WORDS[: 4 + i])} for i in range(9)}  # a new word each
GROWING_RUN = {query_id: [(f"g{i + 1}", 0.0), (f"g{i}", -1.0)] for i, query_id in enumerate(QUERIES)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clues", ["attention", "top_k", "none"])
def test_resumed_after_any_block(tmp_path, monkeypatch, clues, dtype):
    """The models are as they are when they are loaded, not as they were at the cut: no block depends on another."""
    monkeypatch.setattr(rerank_run, "PAIRS_PER_BLOCK", 2)
    options = {"attention": {"num_heads": 4, "rank": 8}, "top_k": {"k": 3, "rank": 8}, "none": {}}[clues]
    blocks = run_blocks(GROWING_RUN)

    def go(path, count: int) -> bytes | None:
        torch.manual_seed(0)
        model = qpeft.get_qpeft_model(
            tiny_lm("llama").to(dtype), qpeft.QPeftConfig(clues=clues, **options), tiny_tokenizer()
        )
        for parameter in () if model.clues is None else model.clues.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        rank_block = by_likelihood(qpeft.Reranker(model))
        partial = formats.PartialRun(path, GROWING_RUN, {}, blocks=blocks)
        try:
            for ids in blocks[partial.num_pieces : count]:
                documents = [[GROWING[doc_id] for doc_id, _ in GROWING_RUN[query_id]] for query_id in ids]
                rankings = rank_block([QUERIES[query_id] for query_id in ids], documents)
                partial.add(
                    {
                        query_id: [(GROWING_RUN[query_id][place][0], score) for place, score in ranking]
                        for query_id, ranking in zip(ids, rankings, strict=True)
                    }
                )
            if count == len(blocks):
                partial.finish()
        finally:
            partial.close()
        return path.read_bytes() if path.exists() else None

    expected = go(tmp_path / "expected", len(blocks))
    assert expected.count(b"\n") == 2 * len(QUERIES) == 2 * len(blocks)
    for done in range(1, len(blocks), 2 if clues == "attention" else 5):
        out = tmp_path / f"run{done}"
        go(out, done)
        assert not out.exists() and go(out, len(blocks)) == expected
