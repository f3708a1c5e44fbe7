"""The postprocessors of LlamaIndex for Jina and for text-embeddings-inference."""

import pytest
from served import DOCUMENTS, KEY, QUERY

pytest.importorskip(
    "llama_index.postprocessor.jinaai_rerank",
    reason="LlamaIndex' client of Jina is not installed; see `make test-clients`",
)
pytest.importorskip(
    "llama_index.postprocessor.tei_rerank", reason="LlamaIndex' client of TEI is not installed; see `make test-clients`"
)
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.jinaai_rerank import JinaRerank
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference


@pytest.fixture
def nodes():
    return [NodeWithScore(node=TextNode(text=text), score=0.1) for text in DOCUMENTS]


def expect_best(server, best, count):
    assert [node.node.get_content() for node in best] == [DOCUMENTS[i] for i in server.order[:count]]
    assert [node.score for node in best] == [server.scores[i] for i in server.order[:count]]


def test_jina(server, nodes):
    client = JinaRerank(base_url=f"{server.url}/v1", api_key=KEY, model="code", top_n=3)
    expect_best(server, client.postprocess_nodes(nodes, query_str=QUERY), 3)
    with pytest.raises(RuntimeError, match="none"):  # its error is what we send as "detail"
        JinaRerank(base_url=f"{server.url}/v1", api_key=KEY, model="none").postprocess_nodes(nodes, query_str=QUERY)


@pytest.mark.parametrize("token", [KEY, f"Bearer {KEY}"])  # it sends what it is given
def test_text_embeddings_inference(server, nodes, token):
    client = TextEmbeddingInference(base_url=server.url, auth_token=token, top_n=3)
    expect_best(server, client.postprocess_nodes(nodes, query_str=QUERY), 3)
