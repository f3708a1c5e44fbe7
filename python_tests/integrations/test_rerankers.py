"""The plug-in for the package rerankers."""

import asyncio

import pytest
from stub_server import DOCUMENTS, QUERY

pytest.importorskip("rerankers", reason="rerankers is not installed; see `make test-plugins`")
from rerankers import Document
from rerankers.models.ranker import BaseRanker

from qpeft_ext.integrations.rerankers import QPeftRanker


def test_texts_with_ids(reranker):
    ranker = QPeftRanker(reranker)
    assert isinstance(ranker, BaseRanker)
    results = ranker.rank(QUERY, DOCUMENTS, doc_ids=list("abcd"), metadata=[{"place": i} for i in range(4)])
    rows = reranker.rank(QUERY, DOCUMENTS)
    assert results.has_scores and results.query == QUERY
    assert [(r.doc_id, r.score, r.rank, r.text, r.place) for r in results] == [
        ("abcd"[row["corpus_id"]], row["score"], rank, DOCUMENTS[row["corpus_id"]], row["corpus_id"])
        for rank, row in enumerate(rows, start=1)
    ]
    assert [r.doc_id for r in results.top_k(1)] == ["abcd"[rows[0]["corpus_id"]]]
    assert ranker.score(QUERY, DOCUMENTS[1]) == results.get_score_by_docid("b")


def test_documents_and_one_text_by_a_url(stub):
    ranker = QPeftRanker(stub.url, api_key="k")
    documents = [Document(text, doc_id=f"n{i}") for i, text in enumerate(DOCUMENTS)]
    results = asyncio.run(ranker.rank_async(QUERY, documents))
    assert [(r.doc_id, r.score) for r in results] == [("n1", 0.75), ("n0", 0.25), ("n3", 0.25), ("n2", 0.0)]
    assert [(r.doc_id, r.score) for r in ranker.rank(QUERY, DOCUMENTS[1])] == [(0, 0.75)]
    assert ranker.rank(QUERY, []).results == [] and ranker.score(QUERY, "moon") == 0.25
