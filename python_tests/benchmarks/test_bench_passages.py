"""The benchmark of long documents: what is joined, and how it counts what is read."""

import sys
from pathlib import Path

import pytest
from families.tiny import tiny_lm, tiny_tokenizer

import qpeft_ext as qpeft

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

bench = pytest.importorskip("bench_passages")


def test_consecutive_documents_of_a_title_are_joined():
    parts = [("a", "A", "one"), ("b", "A", " two "), ("c", "A", "three"), ("d", "B", "four")]
    documents = {i: {"id": i, "title": title, "text": text} for i, title, text in parts}
    long, qrels = bench.joined(documents, {"q": {"b": 1}, "r": {"c": 2, "d": 1}}, 2)
    assert [(d["title"], d["text"]) for d in long.values()] == [("A", "one\n\ntwo"), ("A", "three"), ("B", "four")]
    assert qrels == {"q": {"long0": 1}, "r": {"long1": 2, "long2": 1}}


def test_only_what_is_new_is_read():
    config = qpeft.QPeftConfig(clues="none", max_document_tokens=40)
    model = qpeft.get_qpeft_model(tiny_lm("llama"), config, tiny_tokenizer())
    documents = {"a": {"title": "", "text": "Tides rise twice a day. The moon pulls. Boats leave the harbour."},
                 "b": {"title": "", "text": "short"}}  # fmt: skip
    grown = {**documents, "a": {"title": "", "text": documents["a"]["text"] + " Gulls cry over all of the nets."}}
    ranking = bench.Ranking(model, 1 << 24, passages="max")
    queries, run = {"q": "why tides?"}, {"q": [("b", 2.0), ("a", 1.0)]}
    ranked, first, _ = ranking.read(queries, run, documents)
    again, second, _ = ranking.read(queries, run, documents)
    assert (first, second, ranking.read(queries, run, grown)[1]) == (3, 0, 1)
    assert dict(again["q"]) == pytest.approx(dict(ranked["q"])) and set(dict(ranked["q"])) == {"a", "b"}
    assert len(ranking.texts(list(grown.values())) - ranking.texts(list(documents.values()))) == 1
