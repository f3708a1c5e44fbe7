"""The compressor of langchain-cohere, which needs cohere 5."""

import pytest
from served import DOCUMENTS, KEY, QUERY

pytest.importorskip("langchain_cohere", reason="langchain-cohere is not installed; see `make test-clients`")
from langchain_cohere import CohereRerank
from langchain_core.documents import Document


def test_compress_documents(server):
    compressor = CohereRerank(model="code", base_url=server.url, cohere_api_key=KEY, top_n=3)
    best = compressor.compress_documents([Document(page_content=text) for text in DOCUMENTS], QUERY)
    assert [document.page_content for document in best] == [DOCUMENTS[i] for i in server.order[:3]]
    assert [document.metadata["relevance_score"] for document in best] == [server.scores[i] for i in server.order[:3]]
