"""Files that the system does not give: never called damaged, never removed, and said with the reason."""

import errno
import os

import pytest
import torch
from prefixes.tiny_index import make, model, scores
from small_data import QUERIES, RUN, write_folder

import qpeft_ext as qpeft
from qpeft_ext import formats
from qpeft_ext.formats import PartialRun
from qpeft_ext.prefixes.index import PrefixIndex, shard_paths
from qpeft_ext.ranking.first_stage import bm25_run

pytestmark = pytest.mark.slow

REASONS = {
    errno.EACCES: "Permission denied; let this user read it",
    errno.EIO: "Input/output error; the file itself may be right",
    errno.EMFILE: "Too many open files; the file itself may be right",
}


@pytest.fixture(params=REASONS)
def refuse(request, monkeypatch):
    """Return a function that lets the system refuse to open files whose path has some text, and says the reason."""
    opened = os.open

    def refuse(part: str) -> str:
        def refusing(path, flags, *arguments, **options):
            if part in os.fspath(path) and not flags & os.O_CREAT:
                raise OSError(request.param, os.strerror(request.param), os.fspath(path))
            return opened(path, flags, *arguments, **options)

        monkeypatch.setattr(os, "open", refusing)
        return REASONS[request.param]

    return refuse


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_shard_of_an_index(refuse, tmp_path, caplog):
    lm = model()
    make(tmp_path, lm)
    expected, before = scores(lm), files(tmp_path)
    path = shard_paths(tmp_path)[0]
    reason = refuse(path.name)
    cache = qpeft.DocumentCache(0, index=tmp_path)
    torch.testing.assert_close(scores(lm, cache), expected, rtol=0, atol=1e-4)
    assert [record.message for record in caplog.records] == [
        f"{path} cannot be read ({reason}): its documents are computed again, each time"
    ]
    with pytest.raises(OSError, match=os.path.basename(path)):  # and not removed, as a damaged one is
        make(tmp_path, lm, shard_bytes=1 << 20)
    assert {**before, **files(tmp_path)} == before


def test_a_folder_of_an_index(tmp_path, monkeypatch):
    """Whose names cannot be read: glob finds nothing in it, and all documents would be computed again in silence."""
    make(tmp_path, model())

    def refusing(folder):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(folder))

    monkeypatch.setattr(os, "listdir", refusing)
    with pytest.raises(PermissionError):
        PrefixIndex(tmp_path)
    with pytest.raises(PermissionError):
        _ = formats.open_collection(write_folder(tmp_path / "data")).splits


def test_a_file_of_the_disk_tier(refuse, tmp_path, caplog, monkeypatch):
    lm = model()
    expected = scores(lm, qpeft.DocumentCache(0, disk=tmp_path, disk_bytes=1 << 20))
    before = files(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 6
    reason = refuse(".safetensors")
    cache = qpeft.DocumentCache(0, disk=tmp_path, disk_bytes=1 << 20)
    torch.testing.assert_close(scores(lm, cache), expected, rtol=0, atol=1e-4)
    said = [record.message for record in caplog.records]
    assert len(said) == 6 and all(f"cannot be read ({reason}): its prefix is computed again" in line for line in said)
    monkeypatch.undo()
    assert files(tmp_path).keys() == before.keys()
    assert cache.tiers["disk"].nbytes == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))


def test_an_index_of_bm25(refuse, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("QPEFT_CACHE", str(tmp_path / "cache"))
    corpus = formats.Corpus(write_folder(tmp_path / "data"))
    expected = bm25_run(corpus, QUERIES)
    before = files(tmp_path)
    reason = refuse("bm25-")
    assert bm25_run(corpus, QUERIES) == expected
    assert f"cannot be read ({reason}): the index is built, and not kept" in caplog.text
    assert "damaged" not in caplog.text
    monkeypatch.undo()
    assert files(tmp_path) == before


@pytest.mark.parametrize(("ending", "which"), [("", ".sqlite"), ("", "corpus.jsonl"), (".gz", ".jsonl")])
def test_a_corpus_and_its_index(refuse, ending, which, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("QPEFT_CACHE", str(tmp_path / "cache"))
    folder = write_folder(tmp_path / "data", ending)
    assert len(formats.Corpus(folder)) == 6
    before = files(tmp_path)
    refuse(which)
    with pytest.raises(OSError, match=which) as error:
        formats.Corpus(folder)
    assert error.value.errno in REASONS and "damaged" not in caplog.text
    monkeypatch.undo()
    assert files(tmp_path) == before


def test_the_settings_of_a_job(refuse, tmp_path, monkeypatch):
    """They were called missing or damaged, with the advice to start over."""
    partial = PartialRun(tmp_path / "run", RUN, {"model": 1})
    partial.add({"q1": RUN["q1"]})
    partial.close()
    before = files(tmp_path)
    refuse("run.part.json")
    with pytest.raises(OSError, match="run.part.json"):
        PartialRun(tmp_path / "run", RUN, {"model": 1})
    monkeypatch.undo()
    assert files(tmp_path) == before
    assert PartialRun(tmp_path / "run", RUN, {"model": 1}).num_resumed == 1
