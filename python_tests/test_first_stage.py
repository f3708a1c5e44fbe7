"""BM25: a hand-computed score, odd queries and documents, and known figures on real data."""

import math
import sys

import pytest
from small_data import DOCUMENTS, QUERIES, shared_data

from qpeft_ext import formats
from qpeft_ext.evaluate import evaluate
from qpeft_ext.first_stage import bm25_run

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


def test_without_bm25s(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ImportError, match=r"pip install qpeft_ext\[bm25\]"):
        bm25_run(CORPUS, QUERIES)


@pytest.mark.parametrize("name, split, figure", [
    ("scifact", "test", 0.663), ("cranfield", "test", 0.353), ("cosqa", "test", 0.345), ("squad", "dev", 0.853)])
def test_known_figures(name, split, figure, tmp_path, monkeypatch):
    """nDCG@10 with the defaults; see the docstring of `bm25_run` for what the tokens are."""
    monkeypatch.setenv("QPEFT_CACHE", str(tmp_path))
    folder = shared_data(name)
    queries, qrels = formats.read_queries(folder), formats.beir.read_qrels(folder, split)
    run = bm25_run(formats.Corpus(folder), {q: queries[q] for q in qrels}, k=20)
    assert evaluate(run, qrels, ["nDCG@10"]).means["nDCG@10"] == pytest.approx(figure, abs=0.002)
