"""Readers and writers: round trips, the index of the corpus, and that bad bytes give a ValueError and nothing else."""

import gzip
import json
import os
import pickle
import random
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_data import DOCUMENTS, QRELS, QUERIES, RUN, shared_data, write_folder, write_lines

from qpeft_ext import formats
from qpeft_ext.formats import beir, trec
from qpeft_ext.utils.files import AtomicWriter, write_text


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QPEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


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
    """As the ranks of a training job do."""
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


# -- TREC ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run.trec", "run.trec.gz"])
def test_run_round_trip(tmp_path, name):
    assert formats.write_run(tmp_path / name, RUN, tag="ours") == 9
    back = formats.read_run(tmp_path / name)
    assert {q: [d for d, _ in ranking] for q, ranking in back.items()} == {
        q: [d for d, _ in ranking] for q, ranking in RUN.items()
    }
    assert [file.name for file in tmp_path.iterdir()] == [name]
    text = (gzip.decompress if name.endswith(".gz") else bytes)((tmp_path / name).read_bytes()).decode()
    assert text.splitlines()[0] == "q1 Q0 d4 1 3.0 ours"
    assert [line.split()[3] for line in text.splitlines()] == ["1", "2", "3"] * 3


def test_same_run_same_bytes(tmp_path):
    for name in ("a.gz", "b.gz"):
        formats.write_run(tmp_path / name, RUN)
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.floats(-1e30, 1e30) | st.sampled_from([0.0, -0.0, 1e-45, -1e-45, -300.1, -300.1000001]), min_size=1))
def test_scores_strictly_decrease_as_float32(tmp_path, scores):
    """What trec_eval reads, floats, has the order that was written, whatever the scores and however many are equal."""
    ranking = [(f"d{i}", score) for i, score in enumerate(scores)]
    formats.write_run(tmp_path / "run", {"q": ranking})
    read = [float(np.float32(score)) for _, score in formats.read_run(tmp_path / "run")["q"]]
    assert all(a > b for a, b in zip(read, read[1:], strict=False))
    written = [line.split()[2] for line in (tmp_path / "run").read_text().splitlines()]
    assert written == [d for d, _ in sorted(ranking, key=lambda item: -item[1])]  # equal scores keep their order


def test_ties_in_a_run_go_by_rank_then_id(tmp_path):
    write_lines(tmp_path / "run", ["q Q0 c 3 1.0 t", "q Q0 b 2 1.0 t", "q Q0 a 2 1.0 t", "q Q0 z 9 1.5 t"])
    assert [d for d, _ in formats.read_run(tmp_path / "run")["q"]] == ["z", "a", "b", "c"]


@pytest.mark.parametrize(
    "ranking, message",
    [
        ([("d1", float("nan"))], "query 'q', document 'd1': scores must be finite, got nan"),
        ([("d1", float("inf"))], "must be finite, got inf"),
        ([("d1", 1e39)], "query 'q': the score at rank 1 is 1e\\+39, which is not a finite float32"),
        ([("d1", -3.4028235e38), ("d2", -3.4028235e38)], "rank 2 cannot be lowered"),
        ([("d1", 1.0), ("d2", 1.0), ("d1", 0.5)], "document 'd1' occurs twice for query 'q'"),
        ([("d 1", 1.0)], "doc_id must be text without white space"),
        ([("", 1.0)], "doc_id must be text without white space"),
    ],
)
def test_nothing_half_written(tmp_path, ranking, message):
    (tmp_path / "run").write_text("old")
    with pytest.raises(ValueError, match=message):
        formats.write_run(tmp_path / "run", {"first": [("d1", 1.0)], "q": ranking})
    assert (tmp_path / "run").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_writer_adds_queries_and_appears_at_the_end(tmp_path):
    path = tmp_path / "run.gz"
    with formats.RunWriter(path) as writer:
        assert writer.add("q1", RUN["q1"]) == 3 and writer.add("none", []) == 0
        assert not path.exists()
        with pytest.raises(ValueError, match="query 'q1' is already in the run"):
            writer.add("q1", RUN["q1"])
    assert writer.num_lines == 3 and list(formats.read_run(path)) == ["q1"]
    with pytest.raises(KeyboardInterrupt), formats.RunWriter(tmp_path / "b") as writer:
        writer.add("q1", RUN["q1"])
        raise KeyboardInterrupt
    assert [file.name for file in tmp_path.iterdir()] == ["run.gz"]


def test_atomic_writer_follows_links_and_refuses_what_is_no_file(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    with pytest.raises(ValueError, match="is a folder"):
        AtomicWriter(tmp_path)
    with pytest.raises(FileNotFoundError, match="the folder .*/no does not exist"):
        AtomicWriter(tmp_path / "no" / "file")
    with pytest.raises(ValueError, match="not a regular file"):
        AtomicWriter("/dev/null")
    assert os.path.exists("/dev/null") and not os.path.isfile("/dev/null")


def test_killed_writer_leaves_the_old_file(tmp_path):
    """SIGKILL in the middle of writing: the name still holds what it held."""
    path = tmp_path / "run"
    path.write_text("old")
    program = f"""
import os, signal
from qpeft_ext.formats import RunWriter
writer = RunWriter({str(path)!r})
writer.add("q", [("d", 1.0)])
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert path.read_text() == "old"


HEADER = "query-id\tcorpus-id\tscore"
WANTED = {"q1": {"d1": 2, "d4": -1}, "q2": {"d3": 1}}


@pytest.mark.parametrize(
    "lines",
    [
        ["q1 0 d1 2", "q1\t0\td4\t-1", "q2 Q0 d3 1"],  # TREC
        ["q1 0 d1 2.0", "q1 0 d4 -1.", "q2 0 d3 +1"],
        ["q1 \t0 \td1 \t2", "q1\t0\td4\t-1", "q2\t0\td3\t1 "],
        [HEADER, "q1\td1\t2", "q1\td4\t-1", "q2\td3\t1"],  # BEIR
        ["\ufeff" + HEADER + "\r", "q1\td1\t2\r", "q1\td4\t-1\r", "q2\td3\t1\r"],
        ["query-id corpus-id score", "q1 d1 2", "q1  d4  -1", "q2 d3 1"],
        ["q1\td1\t2", "q1\td4\t-1", "q2\td3\t1"],  # neither header nor iteration
        ["docid qid rel", "d1 q1 2", "d4 q1 -1", "d3 q2 1"],  # other names, another order
        ["qid\tQ0\tdoc_id\trelevance", "q1\t0\td1\t2", "q1\t0\td4\t-1", "q2\t0\td3\t1.0"],
    ],
)
def test_qrels_of_any_shape(tmp_path, lines):
    write_lines(tmp_path / "qrels", lines)
    assert formats.read_qrels(tmp_path / "qrels") == beir.read_qrels(tmp_path / "qrels") == WANTED


def test_ids_with_blanks_between_tabs(tmp_path):
    for number, lines in enumerate((["q 1\t0\td 1\t2"], ["q 1\td 1\t2"], [HEADER, "q 1\td 1\t2"])):
        write_lines(tmp_path / f"qrels{number}", lines)
        assert formats.read_qrels(tmp_path / f"qrels{number}") == {"q 1": {"d 1": 2}}
    write_lines(tmp_path / "run", ["q 1\tQ0\td 1\t1\t1e-3\tmy system"])
    assert formats.read_run(tmp_path / "run") == {"q 1": [("d 1", 0.001)]}
    assert trec.find_line(tmp_path / "run", "q 1", "d 1") == 1
    with pytest.raises(ValueError, match="query_id must be text without white space in a TREC run, got 'q 1'"):
        formats.write_run(tmp_path / "again", formats.read_run(tmp_path / "run"))
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "lines, message",
    [
        (
            ["q1 0 d1 1", "q1 0 d 2 1"],
            "line 2: expected 4 columns as on the first line, got 5.* an id with blanks needs",
        ),
        (["q1 d1 1", "q1 d 2 1"], "line 2: expected 3 columns as on the first line, got 4"),
        (["q1 my doc 1"], "line 1: expected 0 or Q0 as the second of 4 columns"),
        (["q1 0 my doc 1"], "line 1: expected query_id 0 doc_id relevance .TREC. or .*got 5"),
        (
            ["query-id,corpus-id,score", "q1,d1,1"],
            "line 1: expected columns with tabs or blanks between them, got commas",
        ),
        (["q1 0 d1 0.5"], "line 1: expected a whole number as relevance, got '0.5'"),
        (["q1 0 d1 1", "q1 0 d2 99999999999"], "line 2: expected a relevance of at most 1,000,000, got '99999999999'"),
        (["q1 0 d1 nan"], "line 1: expected a whole number as relevance, got 'nan'"),
        (["question passage gold", "q1 d1 1"], "line 1: expected a whole number as relevance, or a header such as"),
        (["q1\t0\t\t1"], "line 1: one of the 4 columns is empty"),
        ([HEADER], "the qrels are empty"),
        (["q1 0 d1 1", "q1 0 d1 1"], "line 2: document 'd1' is judged twice for query 'q1'"),
    ],
)
def test_qrels_that_cannot_be_read(tmp_path, lines, message):
    write_lines(tmp_path / "qrels", lines)
    with pytest.raises(ValueError, match=message):
        formats.read_qrels(tmp_path / "qrels")


def test_find_line(tmp_path):
    path = write_folder(tmp_path) / "run.trec"
    assert trec.find_line(path, "q2") == 4 and trec.find_line(path, "q2", "d5") == 6
    assert trec.find_line(path, "q9") is None


# -- training examples ---------------------------------------------------------------------------------------------


def test_examples_round_trip(tmp_path):
    examples = [
        {"query_id": "q", "query": "é", "positives": ["a", {"id": "x", "title": "t", "text": ""}], "negatives": []},
        {"query": "b", "positives": [{"text": "p", "title": None}], "negatives": ["n"], "more": 1},
    ]
    assert formats.write_examples(tmp_path / "train.jsonl.gz", examples) == 2
    assert formats.read_examples(tmp_path / "train.jsonl.gz") == examples
    write_lines(tmp_path / "b.jsonl", ['{"query": "q", "positives": ["p"]}'])
    assert formats.read_examples(tmp_path / "b.jsonl")[0]["negatives"] == []


def make_examples(**options):
    corpus = {f"d{i}": {"id": f"d{i}", "title": "", "text": f"text {i}"} for i in range(60)}
    run = {q: [(f"d{i}", 60.0 - i) for i in range(60)] for q in ("q1", "q2", "q3")}
    qrels = {
        "q1": {"d3": 1, "d50": 2, "d7": 0},
        "q2": {"d1": 1, "gone": 1},
        "q3": {"gone": 1},
        "q4": {"d1": 0},
        "q5": {"d2": 1},
    }
    queries = {q: f"query {q}" for q in qrels}
    return formats.training_examples(queries, qrels, options.pop("run", run), corpus, **options)


def test_training_examples():
    examples, counts = make_examples()
    first = examples[0]
    assert [example["query_id"] for example in examples] == ["q1", "q2", "q5"]
    assert [document["id"] for document in first["positives"]] == ["d50", "d3"]  # more relevant first
    negatives = [int(document["id"][1:]) for document in first["negatives"]]
    assert len(negatives) == 11 and negatives == sorted(negatives)
    assert max(negatives) <= 40 and not {3, 50} & set(negatives)  # of the 40 best that are not relevant
    assert counts.__dict__ == {
        "examples": 3,
        "without_relevant": 1,
        "without_candidates": 1,
        "missing_positives": 2,
        "without_positives": 1,
        "fewer_negatives": 1,
    }
    assert str(counts).startswith("3 training examples; 1 queries without a relevant document left out; ")


def test_negatives_depend_on_seed_and_query_only():
    whole = {example["query_id"]: example for example in make_examples()[0]}
    assert whole == {example["query_id"]: example for example in make_examples()[0]}
    assert make_examples(seed=1)[0][0]["negatives"] != whole["q1"]["negatives"]
    ids = [[document["id"] for document in whole[q]["negatives"]] for q in ("q1", "q2")]
    assert ids[0] != ids[1]
    assert make_examples(run=None)[0][0]["negatives"] == []
    assert len(make_examples(num_negatives=100)[0][0]["negatives"]) == 40


def test_training_examples_that_cannot_be_made():
    with pytest.raises(ValueError, match="document 'zz' of query 'q1' is in the run but not in the corpus"):
        make_examples(run={"q1": [("zz", 1.0)]})
    with pytest.raises(ValueError, match="query 'q' is in the qrels but not in the queries"):
        formats.training_examples({}, {"q": {"d": 1}}, None, {})
    with pytest.raises(ValueError, match="no training example .*1 queries left out because the corpus holds none"):
        formats.training_examples({"q": "?"}, {"q": {"d": 1}}, None, {})


# -- anything at all -----------------------------------------------------------------------------------------------

_VALID = [
    b'{"_id": "d1", "title": "t", "text": "x"}',
    b'{"_id": "q", "text": "x"}',
    b"query-id\tcorpus-id\tscore",
    b"q\td\t1",
    b"q Q0 d 1 0.5 t",
    b"q 0 d 1",
    b'{"query": "q", "positives": ["p"], "negatives": [{"text": "n"}]}',
]
_STRANGE = [
    b"\n",
    b"\r\n",
    b"\x00",
    b"{",
    b"[]",
    b'{"_id": ',
    b"\xff",
    b"nan",
    b"1e999",
    b"-",
    b"\t",
    b"9" * 5000,
    b"[" * 100_000,
    b'{"_id": 1, "text": 3}',
    b'{"_id": "\\ud800", "text": ""}',
    "q Q0 d \uff12 0.5 t".encode(),
]
_LINES = st.sampled_from(_VALID + _STRANGE) | st.binary(max_size=20)
_PLACES = st.none() | st.integers(0, 60)


def read_corpus(path):
    corpus = formats.Corpus(path)
    return {doc_id: corpus[doc_id] for doc_id in corpus}


@pytest.mark.parametrize(
    "reader",
    [
        read_corpus,
        beir.read_queries,
        beir.read_qrels,
        formats.read_qrels,
        formats.read_run,
        formats.read_examples,
    ],
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(lines=st.lists(_LINES, max_size=8), compressed=st.booleans(), cut=_PLACES, flip=_PLACES)
def test_any_bytes_give_a_result_or_a_value_error(tmp_path, reader, lines, compressed, cut, flip):
    data = b"\n".join(lines)
    path = tmp_path / ("file.gz" if compressed else "file")
    content = gzip.compress(data, mtime=0) if compressed else data
    if flip is not None and flip < len(content):
        content = content[:flip] + bytes([content[flip] ^ 0x55]) + content[flip + 1 :]
    path.write_bytes(content[:cut])
    try:
        result = reader(path)
    except ValueError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error) and len(str(error)) < 400 + len(str(path))
    else:
        assert result, "an empty file must be an error"
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_a_header_of_tab_separated_texts_is_none(tmp_path):
    from qpeft_ext.formats import msmarco

    write_lines(tmp_path / "queries.dev.tsv", ["qid\tquery", "q 1\twhy", "qid\twho"])
    assert msmarco.read_queries(tmp_path / "queries.dev.tsv") == {"q 1": "why", "qid": "who"}
    write_lines(tmp_path / "collection.tsv", ["pid\tpassage", "1\tthe sea"])
    assert list(formats.open_collection(tmp_path).corpus) == ["1"]
