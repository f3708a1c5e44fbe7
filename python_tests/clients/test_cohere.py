"""The client of Cohere, versions 5 and 7."""

import asyncio

import pytest
from served import DOCUMENTS, KEY, QUERY

cohere = pytest.importorskip("cohere", reason="cohere is not installed; see `make test-clients`")


@pytest.fixture
def client(server):
    return cohere.ClientV2(KEY, base_url=server.url)


def test_rerank(client, server):
    answer = client.rerank(model="code", query=QUERY, documents=DOCUMENTS)
    assert [row.index for row in answer.results] == server.order
    assert [row.relevance_score for row in answer.results] == [server.scores[i] for i in server.order]
    assert answer.id and answer.meta.api_version.version
    assert answer.meta.billed_units.search_units == 1 and answer.meta.tokens.input_tokens > 0


def test_top_n_and_a_limit_of_tokens(client, server):
    answer = client.rerank(model="code", query=QUERY, documents=DOCUMENTS, top_n=2, max_tokens_per_doc=4096)
    assert [row.index for row in answer.results] == server.order[:2]
    cut = client.rerank(model="code", query=QUERY, documents=DOCUMENTS, max_tokens_per_doc=2)
    assert cut.meta.warnings and len(cut.results) == len(DOCUMENTS)


def test_asynchronously(server):
    async def rank():
        client = cohere.AsyncClientV2(KEY, base_url=server.url)
        return await client.rerank(model="code", query=QUERY, documents=DOCUMENTS, top_n=1)

    assert [row.index for row in asyncio.run(rank()).results] == server.order[:1]


def test_version_1_with_documents_in_the_answer(server):
    client = cohere.Client(KEY, base_url=server.url)
    answer = client.rerank(model="code", query=QUERY, documents=[{"text": t} for t in DOCUMENTS], return_documents=True)
    assert [row.index for row in answer.results] == server.order
    assert [row.document.text for row in answer.results] == [DOCUMENTS[i] for i in server.order]


def test_errors_are_its_own_types_with_our_words(client, server):
    with pytest.raises(cohere.UnauthorizedError) as wrong_key:
        cohere.ClientV2("another", base_url=server.url).rerank(model="code", query=QUERY, documents=DOCUMENTS)
    assert wrong_key.value.body["message"]
    with pytest.raises(cohere.NotFoundError) as no_model:
        client.rerank(model="none", query=QUERY, documents=DOCUMENTS)
    assert "none" in no_model.value.body["message"]
    with pytest.raises(cohere.BadRequestError) as empty:
        client.rerank(model="code", query=QUERY, documents=[])
    assert "documents" in empty.value.body["message"]
