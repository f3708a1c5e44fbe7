"""BM25: a hand-computed score, odd queries and documents, and known figures on real data."""

import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
from small_data import DOCUMENTS, QUERIES, shared_data, write_folder

from qpeft_ext import formats
from qpeft_ext.evaluation.measures import evaluate
from qpeft_ext.formats.ir_datasets import Documents
from qpeft_ext.ranking.first_stage import BM25, bm25_run

pytestmark = pytest.mark.slow

CORPUS = {i: {"id": i, "title": title, "text": text} for i, (title, text) in DOCUMENTS.items()}


def test_hand_computed_score():
    corpus = {"a": {"text": "apple apple pear"}, "b": {"text": "pear"}, "c": {"title": "Plum", "text": ""}}
    k1, b, average = 0.9, 0.4, 5 / 3
    idf = math.log(1 + (3 - 1 + 0.5) / (1 + 0.5))
    expected = idf * 2 / (2 + k1 * (1 - b + b * 3 / average))
    run = bm25_run(corpus, {"q": "Apple!", "t": "plum"})
    assert run["q"] == [("a", pytest.approx(expected, rel=1e-5))]
    assert [doc_id for doc_id, _ in run["t"]] == ["c"]  # the title counts


def test_order_and_depth():
    run = bm25_run(CORPUS, QUERIES, k=100)  # more than there are
    assert list(run) == list(QUERIES)
    assert [ranking[0][0] for ranking in run.values()] == ["d4", "d3", "d2"]
    for ranking in run.values():
        scores = [score for _, score in ranking]
        assert scores == sorted(scores, reverse=True) and min(scores) > 0
    assert {q: ranking[:1] for q, ranking in run.items()} == bm25_run(CORPUS, QUERIES, k=1)


def test_documents_and_queries_without_words():
    """Neither an empty document nor a query of unknown words, stop words or signs is an error."""
    run = bm25_run(CORPUS, {"signs": "?!", "stop": "the of", "unknown": "zebra", "known": "boats"})
    assert [len(run[q]) for q in ("signs", "stop", "unknown")] == [0, 0, 0]
    assert run["known"][0][0] == "d3"
    assert bm25_run({"a": {"text": ""}, "b": {"text": "?"}}, {"q": "x"}) == {"q": []}


def test_equal_scores_keep_the_order_of_the_corpus():
    corpus = {f"d{i:02}": {"text": "same words here"} for i in range(50)}
    assert [d for d, _ in bm25_run(corpus, {"q": "words"}, k=7)["q"]] == [f"d{i:02}" for i in range(7)]


def test_bad_arguments():
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        bm25_run(CORPUS, QUERIES, k=0)
    with pytest.raises(ValueError, match="the corpus is empty"):
        bm25_run({}, QUERIES)


@pytest.mark.parametrize("k1, b", [(-0.1, 0.4), (math.nan, 0.4), (math.inf, 0.4), (1e7, 0.4), (0.9, 1.1), (0.9, -1)])
def test_values_that_make_no_bm25(k1, b):
    with pytest.raises(ValueError, match="k1 must be from 0 to 1,000,000 and b from 0 to 1"):
        bm25_run(CORPUS, QUERIES, k1=k1, b=b)


def test_the_largest_k1_counts_words_as_they_are():
    """Its scores are the counts of words, each with its weight, over k1."""
    corpus = {"a": {"text": "tide"}, "b": {"text": "tide tide tide"}, "c": {"text": "moon"}}
    scores = dict(bm25_run(corpus, {"q": "tide"}, k1=1e6, b=0)["q"])
    idf = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    assert scores == pytest.approx({"b": 3 * idf / (3 + 1e6), "a": idf / (1 + 1e6)}, rel=1e-5)


def test_k1_and_b_matter():
    runs = [bm25_run(CORPUS, QUERIES, k1=k1, b=b) for k1, b in ((0.9, 0.4), (2.0, 0.4), (0.9, 1.0))]
    assert runs[0] != runs[1] != runs[2] != runs[0]


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A folder of data, and the indexes that are kept now."""
    monkeypatch.setenv("QPEFT_CACHE", str(tmp_path / "cache"))
    folder = write_folder(tmp_path / "data")
    return folder, lambda: sorted((tmp_path / "cache").glob("bm25-*"))


def test_indexes_of_values_that_differ_in_the_seventh_digit(kept):
    folder, indexes = kept
    runs = [bm25_run(formats.Corpus(folder), QUERIES, k1=k1) for k1 in (0.9, 0.90000001, 0.9)]
    assert len(indexes()) == 2 and runs[0] == runs[2]
    for k1, b, count in ((0.0, 0.0, 3), (-0.0, -0.0, 3), (1, 1, 4), (1.0, 1.0, 4)):
        bm25_run(formats.Corpus(folder), QUERIES, k1=k1, b=b)
        assert len(indexes()) == count


def test_the_index_is_kept_and_gives_the_same_run(kept, monkeypatch):
    folder, indexes = kept
    first = bm25_run(formats.Corpus(folder), QUERIES)
    assert first == bm25_run(CORPUS, QUERIES) and len(indexes()) == 1
    with monkeypatch.context() as patch:
        patch.setattr(BM25, "_build", lambda *_: pytest.fail("the index was built again"))
        assert bm25_run(formats.Corpus(folder), QUERIES | {"none": "zebra"}) == first | {"none": []}
    bm25_run(formats.Corpus(folder), QUERIES, k1=1.2)
    assert len(indexes()) == 2  # one for each setting
    lines = (folder / "corpus.jsonl").read_text().replace("month", "fortnight")
    (folder / "corpus.jsonl").write_text(lines)
    changed = bm25_run(formats.Corpus(folder), {"q": "fortnight", "r": "month"})
    assert [doc_id for doc_id, _ in changed["q"]] == ["d2"] and changed["r"] == []
    assert len(indexes()) == 1  # those of the corpus as it was are gone


def test_the_index_of_one_collection_does_not_replace_that_of_another(kept):
    _, indexes = kept

    class Collected(dict):
        def fingerprint(self):
            return Documents(SimpleNamespace(dataset_id=lambda: self.name)).fingerprint()

    for name in ("beir/scifact/test", "beir/nfcorpus/test", "beir-scifact/dev"):
        corpus = Collected(CORPUS)
        corpus.name = name
        bm25_run(corpus, QUERIES)
    assert len(indexes()) == 3


def test_a_damaged_index_is_built_again(kept):
    folder, indexes = kept
    first = bm25_run(formats.Corpus(folder), QUERIES)
    for name in sorted(file.name for file in indexes()[0].iterdir()):
        for damage in (lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()[:20])):
            damage(indexes()[0] / name)
            assert bm25_run(formats.Corpus(folder), QUERIES) == first, name


def test_an_interrupted_build_leaves_no_index(kept, monkeypatch):
    folder, indexes = kept

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("qpeft_ext.ranking.first_stage._rename_folder", interrupt)
    with pytest.raises(KeyboardInterrupt):
        bm25_run(formats.Corpus(folder), QUERIES)
    assert indexes() == []


def test_without_bm25s(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ImportError, match=r"pip install 'qpeft_ext\[bm25\]'"):
        bm25_run(CORPUS, QUERIES)


def test_bm25s_without_jax(tmp_path):
    """Importing bm25s would run an operation of JAX, which takes most of a GPU's memory. Other packages may have it."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").touch()
    (tmp_path / "jax" / "lax.py").write_text("def top_k(*arguments): raise SystemExit('an operation of JAX has run')")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from qpeft_ext.adapters.filters import stop_words
from qpeft_ext.ranking.first_stage import BM25
assert "the" in stop_words()
assert BM25({{"d": {{"text": "red fox"}}}}).search("fox", 1)[0][0] == "d"
assert "jax" not in sys.modules
import jax
from qpeft_ext.utils.optional import import_bm25s
import_bm25s()
assert sys.modules["jax"] is jax
import bm25s.selection
assert not bm25s.selection.JAX_IS_AVAILABLE
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize(
    "name, split, figure",
    [("scifact", "test", 0.663), ("cranfield", "test", 0.353), ("cosqa", "test", 0.345), ("squad", "dev", 0.853)],
)
def test_known_figures(name, split, figure, tmp_path, monkeypatch):
    """nDCG@10 with the defaults; see the docstring of `bm25_run` for what the tokens are."""
    monkeypatch.setenv("QPEFT_CACHE", str(tmp_path))
    folder = shared_data(name)
    queries, qrels = formats.read_queries(folder), formats.beir.read_qrels(folder, split)
    run = bm25_run(formats.Corpus(folder), {q: queries[q] for q in qrels}, k=20)
    assert evaluate(run, qrels, ["nDCG@10"]).means["nDCG@10"] == pytest.approx(figure, abs=0.002)
