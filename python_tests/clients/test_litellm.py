"""LiteLLM, by the four of its providers that send requests of other forms."""

import os

import pytest
from served import DOCUMENTS, KEY, QUERY

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # read on import; else it asks the network
litellm = pytest.importorskip("litellm", reason="litellm is not installed; see `make test-clients`")

PROVIDERS = ["cohere", "jina_ai", "hosted_vllm", "huggingface"]


def rerank(server, provider, key=KEY, **options):
    return litellm.rerank(
        model=f"{provider}/code", query=QUERY, documents=DOCUMENTS, api_base=server.url, api_key=key, **options
    )


@pytest.mark.parametrize("provider", PROVIDERS)
def test_rerank(server, provider):
    answer = rerank(server, provider)
    assert [row["index"] for row in answer.results] == server.order
    assert [row["relevance_score"] for row in answer.results] == [server.scores[i] for i in server.order]


@pytest.mark.parametrize("provider", PROVIDERS[:3])
def test_top_n(server, provider):
    assert [row["index"] for row in rerank(server, provider, top_n=2).results] == server.order[:2]


@pytest.mark.parametrize("provider", ["jina_ai", "hosted_vllm", "huggingface"])
def test_documents_in_the_answer(server, provider):
    answer = rerank(server, provider, return_documents=True)
    assert [row["document"]["text"] for row in answer.results] == [DOCUMENTS[i] for i in server.order]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_wrong_key_is_an_error(server, provider):
    with pytest.raises(Exception, match="(?i)key|auth|401"):
        rerank(server, provider, key="another")
