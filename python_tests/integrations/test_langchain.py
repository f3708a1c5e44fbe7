"""The plug-ins for LangChain, with langchain-core."""

import asyncio

import pytest
from stub_server import DOCUMENTS, QUERY

pytest.importorskip("langchain_core", reason="langchain-core is not installed; see `make test-plugins`")
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda

from qpeft_ext.integrations.langchain import QPeftCompressor, QPeftCrossEncoder


@pytest.fixture
def found():
    return [Document(page_content=text, metadata={"place": i}) for i, text in enumerate(DOCUMENTS)]


def test_documents_come_best_first_as_copies_with_scores(reranker, found):
    best = QPeftCompressor(reranker=reranker, top_n=3).compress_documents(found, QUERY)
    rows = reranker.rank(QUERY, DOCUMENTS, top_k=3)
    assert [(d.metadata["place"], d.metadata["relevance_score"]) for d in best] == [
        (row["corpus_id"], row["score"]) for row in rows
    ]
    assert [d.page_content for d in best] == [DOCUMENTS[row["corpus_id"]] for row in rows]
    assert all("relevance_score" not in document.metadata for document in found)
    assert QPeftCompressor(reranker=reranker).compress_documents([], QUERY) == []


def test_by_a_url(stub, found):
    compressor = QPeftCompressor(reranker=stub.url, top_n=2, api_key="secret", model="m")
    best = asyncio.run(compressor.acompress_documents(found, QUERY))
    assert [(d.metadata["place"], d.metadata["relevance_score"]) for d in best] == [(1, 0.75), (0, 0.25)]
    assert stub.requests[0][1]["Authorization"] == "Bearer secret" and stub.requests[0][2]["model"] == "m"
    assert "secret" not in repr(compressor)


def test_behind_a_retriever_in_a_chain(stub, found):
    class Retriever(BaseRetriever):
        def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun):
            return found

    compressor = QPeftCompressor(reranker=stub.url, top_n=1)
    chain = {"documents": Retriever(), "query": RunnableLambda(str)} | RunnableLambda(
        lambda given: compressor.compress_documents(**given)
    )
    assert [document.page_content for document in chain.invoke(QUERY)] == [DOCUMENTS[1]]


def test_the_cross_encoder_scores_pairs(reranker, stub):
    pairs = [(QUERY, text) for text in DOCUMENTS]
    scores = QPeftCrossEncoder(reranker).score(pairs)
    assert scores == reranker.predict(pairs).tolist() and type(scores[0]) is float
    assert QPeftCrossEncoder(stub.url).score(pairs) == [0.25, 0.75, 0.0, 0.25]


def test_instructions(reranker, stub, found):
    best = QPeftCompressor(reranker=reranker, instruction="Find the moon.").compress_documents(found, QUERY)
    rows = reranker.rank(QUERY, DOCUMENTS, instruction="Find the moon.")
    assert [document.metadata["relevance_score"] for document in best] == [row["score"] for row in rows]
    QPeftCrossEncoder(stub.url, instruction="Find the sea.").score([(QUERY, DOCUMENTS[0])])
    assert stub.requests[0][2]["instruction"] == "Find the sea."


def test_what_is_set_later_counts_or_is_refused(reranker, found):
    compressor = QPeftCompressor(reranker=reranker)
    compressor.instruction, compressor.threshold, compressor.top_n = "Find the moon.", 0.0, 2
    rows = reranker.rank(QUERY, DOCUMENTS, top_k=2, instruction="Find the moon.", threshold=0.0)
    expected = [(row["corpus_id"], row["relevance"]) for row in rows]
    for each in (compressor, QPeftCompressor(reranker=reranker).model_copy(update=dict(compressor))):
        best = each.compress_documents(found, QUERY)
        assert [(d.metadata["place"], d.metadata["relevance_score"]) for d in best] == expected
    for name in ("reranker", "options", "api_key", "model"):
        with pytest.raises(ValueError, match="Field is frozen"):
            setattr(compressor, name, None)


@pytest.mark.parametrize("wrong", [{"top_n": 0}, {"top_k": 3}])
def test_wrong_options(reranker, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        QPeftCompressor(reranker=reranker, **wrong)
