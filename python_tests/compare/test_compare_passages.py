"""A method of `qpeft compare` that ranks by passages, as `Reranker` does, also with an index."""

import pytest
from jobs.compare_job import compare, results, runs, write_plan

import qpeft_ext as qpeft
from qpeft_ext import formats
from qpeft_ext.cli import main

pytestmark = pytest.mark.slow


pytest.importorskip("bm25s")
pytest.importorskip("ir_measures")
OPTIONS = {"passages": "max", "passage_tokens": 24}


def test_a_method_ranks_by_passages(job, tmp_path):
    index = ["index", job / "data", "--out", tmp_path / "index", "--base-model", job / "lm", "--dtype", "float32",
             "--max-document-tokens", "40"]  # fmt: skip
    assert main([str(argument) for argument in index]) == 0
    methods = ["UPR: {method: upr}", "MaxP: {method: upr, passages: max, passage_tokens: 24}"]
    plan = write_plan(
        tmp_path / "plan.yaml", job, methods, **{"    split: test\n": f"    split: test\n    index: {tmp_path}/index\n"}
    )
    assert compare(plan, job, tmp_path / "out") == 0
    found = results(tmp_path / "out")
    assert found["MaxP", 0]["settings"].items() >= OPTIONS.items() and "passages" not in found["UPR", 0]["settings"]
    assert found["UPR", 0]["ranking"]["prefixes_from_index"] and not found["MaxP", 0]["ranking"]["prefixes_from_index"]
    lm = qpeft.load_lm(job / "lm", dtype="float32")
    model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="none", max_document_tokens=40))
    reranker, corpus = qpeft.Reranker(model, **OPTIONS), formats.Corpus(job / "data")
    queries = formats.open_collection(job / "data").queries("test")
    run = runs(tmp_path / "out")["tiny/MaxP/seed-0"]
    assert len(run) == 8
    for query_id, ranking in run.items():
        scores = reranker.predict([(queries[query_id], corpus[doc_id]) for doc_id, _ in ranking])
        assert [score for _, score in ranking] == pytest.approx(scores.tolist(), abs=1e-4)
