"""`RerankClient`, which the plug-ins use."""

import pytest
from served import DOCUMENTS, KEY, QUERY

from qpeft_ext.integrations.client import RerankClient

pytest.importorskip("cohere", reason="this server runs for other clients too; see `make test-clients`")


def test_rank_and_predict(server):
    client = RerankClient(server.url, api_key=KEY, model="code")
    documents = [{"title": "", "text": text} for text in DOCUMENTS]
    assert client.rank(QUERY, documents, top_k=2) == [
        {"corpus_id": i, "score": server.scores[i]} for i in server.order[:2]
    ]
    assert client.predict([(QUERY, text) for text in DOCUMENTS]).tolist() == server.scores


@pytest.mark.parametrize(
    ("key", "model", "message"), [("another", None, "401"), (KEY, "none", "404 Not Found: .*none")]
)
def test_errors(server, key, model, message):
    with pytest.raises(RuntimeError, match=message):
        RerankClient(server.url, api_key=key, model=model).rank(QUERY, DOCUMENTS)
