"""Indexes of passages: made, used by rerankers with the same passages, and refused by others."""

from __future__ import annotations

import json

import pytest
from jobs.tiny_job import copy_job
from small_data import RUN
from tiny_index import command, contents, corpus, error, make, model

import qpeft_ext as qpeft
from qpeft_ext import formats
from qpeft_ext.engine.causal import CausalEngine
from qpeft_ext.prefixes.index import PrefixIndex
from qpeft_ext.prompts.passages import Splitter

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache_folder")]

LONG = {"d1": ("Tides", "The sea rises twice a day. The moon pulls it."), "d2": ("", "short")}  # two passages and one


def test_a_reranker_reads_the_passages_of_an_index(tmp_path, monkeypatch):
    lm = model()
    splitter = Splitter(lm.prompt, 40)
    survey = make(tmp_path, lm, corpus(LONG), splitter=splitter)
    assert (survey.documents, survey.passages, survey.distinct, survey.cut) == (2, 3, 3, 0)
    assert json.loads((tmp_path / "manifest.json").read_text())["passages"] == splitter.settings
    # a document that grew by a sentence: one passage is new
    text = LONG["d1"][1]
    grown = {"d1": ("Tides", f"{text} Boats leave the harbour then."), "d2": LONG["d2"]}
    assert make(tmp_path, lm, corpus(grown), splitter=splitter).missing == 1 and len(contents(tmp_path)) == 4
    documents = list(corpus(grown).values())
    expected = qpeft.Reranker(lm, passages="mean", passage_tokens=40).rank("why tides?", documents)
    monkeypatch.setattr(CausalEngine, "prefill", lambda *_: pytest.fail("a prefix was computed"))
    cache = qpeft.DocumentCache(0, index=tmp_path)
    rows = qpeft.Reranker(lm, passages="mean", passage_tokens=40, cache=cache).rank("why tides?", documents)
    assert [row["corpus_id"] for row in rows] == [row["corpus_id"] for row in expected]
    assert [row["score"] for row in rows] == pytest.approx([row["score"] for row in expected], abs=1e-4)
    assert (cache.hits, cache.misses) == (4, 0)


def test_other_passages_are_refused(tmp_path):
    lm = model()
    make(tmp_path / "passages", lm, corpus(LONG), splitter=Splitter(lm.prompt, 40, 20))
    make(tmp_path / "whole", lm, corpus(LONG))
    told = r"the index .*{} was made of {}, here {} are read; use what it was made with, or make another one"
    for folder, options, then, now in [
        ("passages", {}, r"passages \(passage_tokens 40, passage_stride 20\)", "whole documents"),
        (
            "whole",
            {"passages": "max", "passage_tokens": 40},
            "whole documents",
            r"passages \(passage_tokens 40, .* 40\)",
        ),
        ("passages", {"passages": "max", "passage_tokens": 40}, r"passages .* 20\)", r"passages .* 40\)"),
    ]:
        cache = qpeft.DocumentCache(0, index=tmp_path / folder)
        with pytest.raises(ValueError, match=told.format(folder, then, now)):
            qpeft.Reranker(lm, cache=cache, **options).rank("why tides?", ["short"])
    with pytest.raises(ValueError, match=r"was made of passages .*, here whole documents are read"):
        make(tmp_path / "passages", lm, corpus(LONG))
    with pytest.raises(ValueError, match=r"was made of passages .*, here whole documents are read"):
        PrefixIndex(tmp_path / "passages").expect_prompt(lm.prompt)  # as training does


def test_the_commands(job, tmp_path, capsys):
    """An index of passages and a run by them, which is what the public API gives."""
    mine = copy_job(job, tmp_path / "mine")
    passages = ["--passages", "max", "--passage-tokens", "32", "--passage-stride", "16"]
    index = ["index", mine / "data", "--out", tmp_path / "index", "--model", mine / "adapter"]
    assert "6 documents in 12 passages, 12 different ones; 12 to compute" in command(capsys, *index, *passages)
    arguments = ["rerank", "--model", mine / "adapter", "--data", mine / "data", "--run", mine / "data" / "run.trec",
                 "--index", tmp_path / "index", "--output", tmp_path / "mine.trec"]  # fmt: skip
    assert "was made of passages" in error(capsys, *arguments)
    assert "passage_stride 8" in error(capsys, *arguments, *passages[:-1], "8")
    assert "passage_stride is of no use without passages" in error(capsys, *arguments, "--passage-stride", "8")
    assert "passages must be max, mean or first, got 'sum'" in error(capsys, *arguments, "--passages", "sum")
    out = command(capsys, *arguments, *passages, "--upr", "--similarity-only")
    assert out.count("100% cache hits") == 2 and "cut to max_document_tokens" not in out
    scorer = qpeft.Reranker.from_pretrained(mine / "adapter", passages="max", passage_tokens=32, passage_stride=16)
    documents = formats.Corpus(mine / "data")
    for query_id, ranking in formats.read_run(tmp_path / "mine.trec").items():
        ids = [doc_id for doc_id, _ in RUN[query_id]]
        query = formats.open_collection(mine / "data").queries("test")[query_id]
        rows = scorer.rank(query, [documents[doc_id] for doc_id in ids])
        assert [doc_id for doc_id, _ in ranking] == [ids[row["corpus_id"]] for row in rows]
