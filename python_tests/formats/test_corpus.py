"""BEIR folders, and the index by which a corpus finds its documents."""

import json
import os
import pickle
import random
import subprocess
import sys
import threading

import pytest
from small_data import DOCUMENTS, QRELS, QUERIES, shared_data, write_folder, write_lines

from qpeft_ext import formats
from qpeft_ext.formats import beir

pytestmark = pytest.mark.slow


# -- BEIR folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_folder(tmp_path, ending):
    folder = write_folder(tmp_path / "data", ending)
    corpus = formats.Corpus(folder)
    assert len(corpus) == 6 and list(corpus) == list(DOCUMENTS)
    order = [*DOCUMENTS] * 3
    random.Random(0).shuffle(order)
    for doc_id in order:
        title, text = DOCUMENTS[doc_id]
        assert corpus[doc_id] == {"id": doc_id, "title": title, "text": text}
    assert "d1" in corpus and "d7" not in corpus and 7 not in corpus
    with pytest.raises(KeyError):
        corpus["d7"]
    assert beir.read_queries(folder) == QUERIES
    assert beir.read_qrels(folder) == beir.read_qrels(folder, "train") == QRELS
    assert beir.splits(folder) == ["test", "train"]
    assert formats.read_qrels(folder / "qrels" / f"test.tsv{ending}") == QRELS


def test_numbers_as_ids_missing_titles_blank_lines_and_other_scripts(tmp_path):
    lines = ['\ufeff{"_id": 7, "text": "seven"}', "", '{"_id": "é\u3000ß", "title": null, "text": "zwölf 月"}\r', "  "]
    write_lines(tmp_path / "corpus.jsonl", lines)
    corpus = formats.Corpus(tmp_path)
    assert list(corpus) == ["7", "é\u3000ß"]
    assert corpus["7"]["text"] == "seven" and corpus["é\u3000ß"]["text"] == "zwölf 月"


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_index_is_built_once_and_again_when_the_file_changes(tmp_path, cache, ending, monkeypatch):
    folder = write_folder(tmp_path / "data", ending)
    file = folder / f"corpus.jsonl{ending}"
    formats.Corpus(folder)
    kept = sorted(cache.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("qpeft_ext.formats.corpus._build_index", lambda *_: pytest.fail("the index was built again"))
        assert len(formats.Corpus(folder)) == len(formats.Corpus(file)) == 6
    write_lines(file, ['{"_id": "new", "text": "n"}'])
    assert list(formats.Corpus(folder)) == ["new"]
    now = sorted(cache.iterdir())
    assert len(now) == len(kept) and not set(now) & set(kept), "an outdated index must be replaced"


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_damaged_cache_is_built_again(tmp_path, cache, ending):
    folder = write_folder(tmp_path / "data", ending)
    formats.Corpus(folder)
    for file in cache.iterdir():
        content = file.read_bytes()
        for damaged in (b"", content[: len(content) // 2], b"x" * len(content)):
            if file.suffix == ".jsonl" and len(damaged) == len(content):
                continue  # same size: found when a document is read
            file.write_bytes(damaged)
            assert formats.Corpus(folder)["d2"]["title"] == "Moon"


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_killed_build_leaves_nothing_that_counts(tmp_path, cache, ending):
    """SIGKILL in the middle; the next use builds anew and, an hour later, cleans up."""
    folder = write_folder(tmp_path / "data", ending)
    program = f"""
import os, signal
from qpeft_ext import formats
parse = formats.Corpus.parse
formats.Corpus.parse = lambda self, n, text: os.kill(os.getpid(), signal.SIGKILL) if n == 4 else parse(self, n, text)
formats.Corpus({str(folder)!r})
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    left = list(cache.iterdir())
    assert left and all(file.name.endswith(".tmp") for file in left)
    corpus = formats.Corpus(folder)
    assert len(corpus) == 6 and corpus["d6"]["text"] == "???" and set(left) <= set(cache.iterdir())  # may be in use
    for file in left:
        os.utime(file, (0, 0))
    write_lines(folder / f"corpus.jsonl{ending}", ['{"_id": "new", "text": "n"}'])
    assert list(formats.Corpus(folder)) == ["new"] and not set(left) & set(cache.iterdir())


def test_many_processes_may_build_at_once(tmp_path):
    """Several processes index one corpus at once, like the ranks of a training job."""
    write_lines(tmp_path / "corpus.jsonl.gz", (json.dumps({"_id": f"d{i}", "text": str(i)}) for i in range(20_000)))
    program = f"""
from qpeft_ext import formats
corpus = formats.Corpus({str(tmp_path)!r})
assert len(corpus) == 20_000 and all(corpus[f"d{{i}}"]["text"] == str(i) for i in range(0, 20_000, 37))
"""
    processes = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4


def test_a_change_under_our_feet_is_noticed(tmp_path):
    folder = write_folder(tmp_path / "data")
    corpus = formats.Corpus(folder)
    file = folder / "corpus.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"d2"', b'"dX"'))
    with pytest.raises(ValueError, match=r"corpus.jsonl, line 2: expected document 'd2', got 'dX'"):
        corpus["d2"]


def test_texts_are_not_held_in_memory(tmp_path):
    """60 MB of text, read in a process whose memory may grow by 30 MB."""
    write_lines(tmp_path / "corpus.jsonl.gz", (json.dumps({"_id": str(i), "text": "x" * 60_000}) for i in range(1000)))
    program = f"""
from qpeft_ext import formats

def peak():  # of this process; getrusage would start with what the parent held
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024

before = peak()
corpus = formats.Corpus({str(tmp_path)!r})
assert sum(len(corpus[i]["text"]) for i in corpus) == 60_000_000
assert peak() - before < 30, peak() - before
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_threads_and_other_processes(tmp_path):
    corpus = formats.Corpus(write_folder(tmp_path / "data"))
    failures = []

    def work():
        for _ in range(200):
            for doc_id in corpus:
                if corpus[doc_id]["text"] != DOCUMENTS[doc_id][1]:
                    failures.append(doc_id)

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failures
    if (child := os.fork()) == 0:
        os._exit(0 if corpus["d3"]["text"] == DOCUMENTS["d3"][1] and len(list(corpus)) == 6 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert pickle.loads(pickle.dumps(corpus))["d1"] == corpus["d1"]


def test_cache_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QPEFT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match="set QPEFT_CACHE to a folder"):
        formats.Corpus(write_folder(tmp_path / "data"))


def test_shared_data_sets():
    """Every shared folder reads, whole."""
    for name, documents, queries in [("cranfield", 1400, 225), ("scifact", 5183, 1109), ("squad", 3494, 17542)]:
        folder = shared_data(name)
        corpus = formats.Corpus(folder)
        assert len(corpus) == documents and len(beir.read_queries(folder)) == queries
        for split in beir.splits(folder):
            assert all(doc_id in corpus for judged in beir.read_qrels(folder, split).values() for doc_id in judged)
