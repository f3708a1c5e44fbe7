"""Our plug-ins for LangChain, LlamaIndex and Haystack by the URL of a running server."""

import os

import pytest
from served import DOCUMENTS, KEY, QUERY

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"  # read on import
pytest.importorskip("cohere", reason="this server runs for other clients too; see `make test-clients`")


def test_langchain(server):
    documents = pytest.importorskip("langchain_core.documents", reason="langchain-core is not installed")
    from qpeft_ext.integrations.langchain import QPeftCompressor

    compressor = QPeftCompressor(reranker=server.url, api_key=KEY, model="code", top_n=2)
    best = compressor.compress_documents([documents.Document(page_content=text) for text in DOCUMENTS], QUERY)
    assert [document.page_content for document in best] == [DOCUMENTS[i] for i in server.order[:2]]
    assert [document.metadata["relevance_score"] for document in best] == [server.scores[i] for i in server.order[:2]]


def test_llama_index(server):
    schema = pytest.importorskip("llama_index.core.schema", reason="llama-index-core is not installed")
    from qpeft_ext.integrations.llama_index import QPeftPostprocessor

    nodes = [schema.NodeWithScore(node=schema.TextNode(text=text)) for text in DOCUMENTS]
    best = QPeftPostprocessor(reranker=server.url, api_key=KEY, top_n=2).postprocess_nodes(nodes, query_str=QUERY)
    assert [(node.node.get_content(), node.score) for node in best] == [
        (DOCUMENTS[i], server.scores[i]) for i in server.order[:2]
    ]


def test_haystack(server):
    haystack = pytest.importorskip("haystack", reason="haystack-ai is not installed")
    from haystack.utils import Secret

    from haystack_integrations.components.rankers.qpeft import QPeftRanker

    ranker = QPeftRanker(server.url, top_k=2, api_key=Secret.from_token(KEY), model="code")
    best = ranker.run(QUERY, [haystack.Document(content=text) for text in DOCUMENTS])["documents"]
    assert [(document.content, document.score) for document in best] == [
        (DOCUMENTS[i], server.scores[i]) for i in server.order[:2]
    ]
