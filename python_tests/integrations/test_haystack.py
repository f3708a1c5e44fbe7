"""The component for Haystack, with haystack-ai 3."""

import asyncio
import copy
import os
import threading

import pytest
from stub_server import DOCUMENTS, QUERY

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"  # read on import; it would wait for a host that is not there
pytest.importorskip("haystack", reason="haystack-ai is not installed; see `make test-plugins`")
from haystack import Document, Pipeline
from haystack.components.joiners import DocumentJoiner
from haystack.utils import Secret

from haystack_integrations.components.rankers.qpeft import QPeftRanker


@pytest.fixture
def found():
    return [Document(id=f"d{i}", content=text, score=0.5) for i, text in enumerate(DOCUMENTS)]


def test_documents_come_best_first_as_copies(reranker, found):
    best = QPeftRanker(reranker, top_k=3).run(QUERY, found)["documents"]
    rows = reranker.rank(QUERY, DOCUMENTS, top_k=3)
    assert [(d.id, d.score) for d in best] == [(f"d{row['corpus_id']}", row["score"]) for row in rows]
    assert all(document.score == 0.5 for document in found)


def test_by_a_url_and_asynchronously(stub, found, monkeypatch):
    monkeypatch.setenv("QPEFT_API_KEY", "secret")
    ranker = QPeftRanker(stub.url, api_key=Secret.from_env_var("QPEFT_API_KEY"), model="m")
    best = asyncio.run(ranker.run_async(QUERY, found, top_k=2))["documents"]
    assert [(d.id, d.score) for d in best] == [("d1", 0.75), ("d0", 0.25)]
    assert stub.requests[0][1]["Authorization"] == "Bearer secret" and stub.requests[0][2]["model"] == "m"


def test_same_ids_metadata_and_missing_text(stub):
    documents = [
        Document(id="a", content="x", meta={"title": "moon", "year": None}),
        Document(id="a", content="y"),
        Document(id="b", content=None),
    ]
    ranker = QPeftRanker(stub.url, meta_fields_to_embed=["title", "year"], embedding_separator=" | ")
    best = ranker.run(QUERY, documents)["documents"]
    assert stub.requests[0][2]["documents"] == ["moon | x", ""]
    assert [d.id for d in best] == ["a", "b"]
    assert ranker.run(QUERY, [])["documents"] == []


def test_a_pipeline_is_saved_loaded_and_run(stub, found, monkeypatch):
    pipeline = Pipeline()
    pipeline.add_component("joiner", DocumentJoiner())
    ranker = QPeftRanker(stub.url, top_k=2, options={"timeout": 9.0}, api_key=Secret.from_env_var("QPEFT_API_KEY"))
    pipeline.add_component("ranker", ranker)
    pipeline.connect("joiner.documents", "ranker.documents")
    text = pipeline.dumps()
    assert "haystack_integrations.components.rankers.qpeft.QPeftRanker" in text
    monkeypatch.setenv("QPEFT_API_KEY", "secret")
    again = Pipeline.loads(text)
    assert again.dumps() == text
    given = {"joiner": {"documents": found}, "ranker": {"query": QUERY}}
    assert [d.id for d in again.run(given)["ranker"]["documents"]] == ["d1", "d0"]
    assert stub.requests[0][1]["Authorization"] == "Bearer secret"


def test_a_reranker_in_memory_is_not_saved(reranker):
    pipeline = Pipeline()
    pipeline.add_component("ranker", QPeftRanker(reranker))
    with pytest.raises(Exception, match="a Reranker in memory cannot be saved"):
        pipeline.dumps()


def test_it_is_loaded_once_and_let_go(stub, found, monkeypatch):
    opened = []
    monkeypatch.setattr("qpeft_ext.integrations.haystack.Source", lambda *given: opened.append(given) or Fake())
    ranker = QPeftRanker("adapter", options={"device": "cpu"})
    assert not opened
    ranker.warm_up()
    ranker.run(QUERY, found)
    assert opened == [("adapter", {"device": "cpu"}, None, None, None, None)]
    ranker.close()
    ranker.run(QUERY, found)
    assert len(opened) == 2


def test_threads_that_come_first_together_load_it_once(found, monkeypatch):
    opened, inside = [], threading.Event()

    def open_slowly(*given):
        opened.append(given)
        inside.wait(0.2)  # as long as nobody else is here
        if len(opened) > 1:
            inside.set()
        return Fake()

    monkeypatch.setattr("qpeft_ext.integrations.haystack.Source", open_slowly)
    ranker = QPeftRanker("adapter")

    async def ask_twice():
        return await asyncio.gather(ranker.run_async(QUERY, found), ranker.run_async(QUERY, found))

    assert [len(answer["documents"]) for answer in asyncio.run(ask_twice())] == [1, 1]
    assert len(opened) == 1
    copy.deepcopy(ranker).run(QUERY, found)


class Fake:
    def rank(self, query, documents, top_k):
        return [{"corpus_id": 0, "score": 1.0}]


@pytest.mark.parametrize("top_k", [0, -1])
def test_top_k_below_one(reranker, top_k):
    with pytest.raises(ValueError, match=f"top_k must be at least 1, got {top_k}"):
        QPeftRanker(reranker, top_k=top_k)
    with pytest.raises(ValueError, match=f"top_k must be at least 1, got {top_k}"):
        QPeftRanker(reranker).run(QUERY, [], top_k=top_k)


def test_a_key_that_is_no_secret_and_names_that_are_no_list(stub):
    with pytest.raises(TypeError, match="api_key must be a Secret") as caught:
        QPeftRanker(stub.url, api_key="my-key")
    assert "my-key" not in str(caught.value)
    with pytest.raises(TypeError, match="meta_fields_to_embed must be a list, got the string 'title'"):
        QPeftRanker(stub.url, meta_fields_to_embed="title")  # its letters would be names
