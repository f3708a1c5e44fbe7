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


def test_documents_without_ids_have_their_places(stub):
    """`rerankers.utils.prep_docs` leaves None as the id of all of them."""
    documents = [Document(DOCUMENTS[0]), DOCUMENTS[1], Document(DOCUMENTS[2], doc_id="c", metadata={"a": 1})]
    results = QPeftRanker(stub.url).rank(QUERY, documents)
    assert [(r.doc_id, r.text) for r in results] == [(1, DOCUMENTS[1]), (0, DOCUMENTS[0]), ("c", DOCUMENTS[2])]
    assert results[2].a == 1 and results.get_score_by_docid(0) == 0.25
    assert documents[0].doc_id is None


def test_documents_with_other_ids_and_metadata(stub):
    documents = [Document(text, doc_id=f"n{i}", metadata={"old": i}) for i, text in enumerate(DOCUMENTS)]
    metadata = [{"place": i} for i in range(4)]
    results = QPeftRanker(stub.url).rank(QUERY, documents, doc_ids=[5, 6, 7, 8], metadata=metadata)
    assert [(r.doc_id, r.metadata) for r in results] == [
        (6, {"place": 1}),
        (5, {"place": 0}),
        (8, {"place": 3}),
        (7, {"place": 2}),
    ]
    assert [(document.doc_id, document.metadata) for document in documents] == [(f"n{i}", {"old": i}) for i in range(4)]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"docs": DOCUMENTS, "doc_ids": ["a"]}, ValueError, "4 docs but 1 doc_ids"),
        ({"docs": DOCUMENTS, "doc_ids": list("abcde")}, ValueError, "4 docs but 5 doc_ids"),
        ({"docs": DOCUMENTS, "metadata": [{}]}, ValueError, "4 docs but 1 metadata"),
        ({"docs": ["a", None]}, TypeError, "document 1 must be a string, got None"),
        ({"docs": [Document(document_type="image", base64="")]}, TypeError, "document 0 must be a string, got None"),
        ({"docs": None}, TypeError, "docs must be a list, got None"),
    ],
)
def test_what_cannot_be_ranked(stub, given, error, message):
    with pytest.raises(error, match=message):
        QPeftRanker(stub.url).rank(QUERY, **given)
    assert not stub.requests
