"""The ranker of cohere-haystack."""

import os

import pytest
from served import DOCUMENTS, KEY, QUERY

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"  # read on import
pytest.importorskip(
    "haystack_integrations.components.rankers.cohere",
    reason="cohere-haystack is not installed; see `make test-clients`",
)
from haystack import Document
from haystack.utils import Secret
from haystack_integrations.components.rankers.cohere import CohereRanker


def test_rank(server):
    ranker = CohereRanker(model="code", api_base_url=server.url, api_key=Secret.from_token(KEY), top_k=3)
    best = ranker.run(QUERY, [Document(content=text) for text in DOCUMENTS])["documents"]
    assert [document.content for document in best] == [DOCUMENTS[i] for i in server.order[:3]]
    assert [document.score for document in best] == [server.scores[i] for i in server.order[:3]]
