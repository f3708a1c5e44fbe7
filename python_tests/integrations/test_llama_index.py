"""The plug-in for LlamaIndex, with llama-index-core."""

import asyncio
import json
from pathlib import Path

import pytest
from stub_server import DOCUMENTS, QUERY

pytest.importorskip("llama_index.core", reason="llama-index-core is not installed; see `make test-plugins`")
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

import qpeft_ext
from qpeft_ext.integrations.llama_index import QPeftPostprocessor


@pytest.fixture
def nodes():
    return [NodeWithScore(node=TextNode(text=text, id_=f"n{i}"), score=0.5) for i, text in enumerate(DOCUMENTS)]


def test_nodes_come_best_first_with_new_scores(reranker, nodes):
    best = QPeftPostprocessor(reranker=reranker, top_n=3).postprocess_nodes(nodes, query_str=QUERY)
    rows = reranker.rank(QUERY, DOCUMENTS, top_k=3)
    assert [(n.node.node_id, n.score) for n in best] == [(f"n{row['corpus_id']}", row["score"]) for row in rows]
    assert all(node.score == 0.5 for node in nodes)


def test_by_a_url_a_score_of_zero_stays_and_stands_last(stub, nodes):
    postprocessor = QPeftPostprocessor(reranker=stub.url, api_key="secret")
    best = asyncio.run(postprocessor.apostprocess_nodes(nodes, QueryBundle(QUERY)))
    assert [(n.node.node_id, n.score) for n in best] == [("n1", 0.75), ("n0", 0.25), ("n3", 0.25), ("n2", 0.0)]
    assert stub.requests[0][1]["Authorization"] == "Bearer secret"


def test_the_text_is_what_is_embedded(stub):
    node = TextNode(text="a text", metadata={"a": "shown", "b": "hidden"}, excluded_embed_metadata_keys=["b"])
    QPeftPostprocessor(reranker=stub.url).postprocess_nodes([NodeWithScore(node=node)], query_str=QUERY)
    (text,) = stub.requests[0][2]["documents"]
    assert "a text" in text and "shown" in text and "hidden" not in text


def test_events(stub, nodes):
    class Handler(BaseEventHandler):
        seen: list = []

        def handle(self, event, **_):
            self.seen.append(event)

    handler, debug = Handler(), LlamaDebugHandler(print_trace_on_end=False)
    dispatcher = get_dispatcher("qpeft_ext.integrations.llama_index")
    dispatcher.add_event_handler(handler)
    try:
        postprocessor = QPeftPostprocessor(
            reranker=stub.url, top_n=2, model="m", callback_manager=CallbackManager([debug])
        )
        best = postprocessor.postprocess_nodes(nodes, query_str=QUERY)
        assert QPeftPostprocessor(reranker=stub.url).postprocess_nodes([], query_str=QUERY) == []
    finally:
        dispatcher.event_handlers.remove(handler)
    start, end = handler.seen
    assert isinstance(start, ReRankStartEvent) and isinstance(end, ReRankEndEvent)
    assert (start.query.query_str, start.top_n, start.model_name, len(start.nodes)) == (QUERY, 2, "m", 4)
    assert [node.node.node_id for node in end.nodes] == [node.node.node_id for node in best] == ["n1", "n0"]
    ((first, last),) = debug.get_event_pairs(CBEventType.RERANKING)
    assert first.payload[EventPayload.QUERY_STR] == QUERY and len(last.payload[EventPayload.NODES]) == 2


def test_it_is_saved_without_the_key(stub):
    postprocessor = QPeftPostprocessor(reranker=stub.url, top_n=2, api_key="secret")
    saved = postprocessor.to_dict()
    assert "secret" not in str(saved) and saved["class_name"] == "QPeftPostprocessor"
    again = QPeftPostprocessor.from_dict(saved)
    assert (again.reranker, again.top_n, again.api_key) == (stub.url, 2, None)


def test_a_saved_adapter_keeps_its_options(nodes):
    demo = Path(qpeft_ext.__file__).parent / "demo"
    options = {"base_model": str(demo / "base_lm"), "max_document_tokens": 2}
    postprocessor = QPeftPostprocessor(reranker=demo / "adapter", options=options)
    again = QPeftPostprocessor.from_json(postprocessor.to_json())
    assert again.options == options
    found = [each.postprocess_nodes(nodes, query_str=QUERY) for each in (postprocessor, again)]
    assert [node.score for node in found[0]] == [node.score for node in found[1]]


def test_a_reranker_in_memory_is_not_saved_and_given_again(reranker):
    saved = json.loads(QPeftPostprocessor(reranker=reranker, top_n=3).to_json())
    assert "reranker" not in saved
    with pytest.raises(ValueError, match="reranker\n  Field required"):
        QPeftPostprocessor.from_dict(dict(saved))
    again = QPeftPostprocessor.from_dict(saved, reranker=reranker)
    assert again.reranker is reranker and again.top_n == 3


def test_what_is_set_later_counts_or_is_refused(reranker, nodes):
    postprocessor = QPeftPostprocessor(reranker=reranker)
    postprocessor.instruction, postprocessor.threshold = "Find the moon.", 0.0
    rows = reranker.rank(QUERY, DOCUMENTS, instruction="Find the moon.", threshold=0.0)
    best = postprocessor.postprocess_nodes(nodes, query_str=QUERY)
    assert [(n.node.node_id, n.score) for n in best] == [(f"n{row['corpus_id']}", row["relevance"]) for row in rows]
    for name in ("reranker", "options", "api_key", "model"):
        with pytest.raises(ValueError, match="Field is frozen"):
            setattr(postprocessor, name, None)


def test_wrong_use(reranker, nodes):
    with pytest.raises(ValueError, match="top_k\n  Extra inputs are not permitted"):
        QPeftPostprocessor(reranker=reranker, top_k=3)
    with pytest.raises(ValueError, match="top_n"):
        QPeftPostprocessor(reranker=reranker, top_n=0)
    with pytest.raises(ValueError, match="a query is needed"):
        QPeftPostprocessor(reranker=reranker).postprocess_nodes(nodes)
