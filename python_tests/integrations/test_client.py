"""`RerankClient` against a stub of a server; what `Source` opens."""

import importlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from stub_server import DOCUMENTS, QUERY, RELEVANCE

import qpeft_ext
from qpeft_ext.integrations.client import RerankClient, _seconds
from qpeft_ext.integrations.source import Source


def test_rank_sorts_and_keeps_the_order_of_equal_scores(stub):
    rows = RerankClient(stub.url).rank(QUERY, DOCUMENTS)
    assert rows == [{"corpus_id": place, "score": RELEVANCE[place]} for place in (1, 0, 3, 2)]
    path, headers, body = stub.requests[0]
    assert path == "/v1/rerank" and "Authorization" not in headers
    assert body == {"query": QUERY, "documents": DOCUMENTS, "return_documents": False}


def test_top_k_model_and_key_are_sent(stub):
    rows = RerankClient(stub.url + "/", api_key="k", model="m").rank(QUERY, DOCUMENTS, top_k=2)
    assert [row["corpus_id"] for row in rows] == [1, 0]
    _, headers, body = stub.requests[0]
    assert headers["Authorization"] == "Bearer k" and body["top_n"] == 2 and body["model"] == "m"
    assert "k" not in repr(RerankClient(stub.url, api_key="k")).removeprefix("RerankClient")


def test_predict_sends_each_query_once_and_keeps_the_order(stub):
    pairs = [
        (QUERY, DOCUMENTS[1]),
        ("moon", DOCUMENTS[0]),
        (QUERY, {"title": "", "text": DOCUMENTS[0]}),
        ("moon", "moon"),
    ]
    scores = RerankClient(stub.url).predict(pairs)
    assert scores.dtype == np.float64 and scores.tolist() == [0.75, 0.0, 0.25, 1.0]
    assert len(stub.requests) == 2


def test_rank_many_and_no_documents(stub):
    assert RerankClient(stub.url).rank_many(["a", QUERY], [[], DOCUMENTS[:1]]) == [
        [],
        [{"corpus_id": 0, "score": 0.25}],
    ]
    assert len(stub.requests) == 1


def test_instructions_are_sent(stub):
    client = RerankClient(stub.url)
    client.rank_many(["a", "b", "c"], [["x"]] * 3, instruction=["first", None, "third"])
    client.rank_many(["a"], [["x"]], instruction="same")
    client.predict([("a", "x")], instruction="pair")
    assert [body.get("instruction") for _, _, body in stub.requests] == ["first", None, "third", "same", "pair"]


def test_a_busy_server_is_asked_again(stub, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    busy = (429, {"retry-after": "7"}, b"")
    stub.answers = [busy, (503, {}, b"")]
    assert len(RerankClient(stub.url).rank(QUERY, DOCUMENTS)) == 4
    assert waits == [7, 1]
    stub.answers = [busy] * 3
    with pytest.raises(RuntimeError, match="answered 429"):
        RerankClient(stub.url).rank(QUERY, DOCUMENTS)
    assert not stub.answers and waits == [7, 1, 7, 7]


def test_how_long_a_busy_server_may_ask_to_wait():
    assert [_seconds(text) for text in ("1.5", "-1", "1e9", "nan", "Fri, 01 Jan 2027 00:00:00 GMT")] == [
        1.5,
        0,
        30,
        0,
        1,
    ]


@pytest.mark.parametrize(
    ("status", "headers", "body", "message"),
    [
        (400, {}, {"detail": "documents is empty"}, "answered 400 Bad Request: documents is empty"),
        (401, {}, {"message": "no key"}, "answered 401 Unauthorized: no key"),
        (500, {}, {"error": {"message": "broken", "code": 500}}, "answered 500 Internal Server Error: broken"),
        (422, {}, {"error": "too long", "error_type": "validation"}, "answered 422 .*: too long"),
        (404, {}, None, "answered 404 Not Found: no text"),
        (307, {"location": "http://elsewhere/"}, None, "it points to http://elsewhere/; give the final URL"),
    ],
)
def test_the_words_of_an_error_reach_the_user(stub, status, headers, body, message):
    stub.answers = [(status, headers, b"" if body is None else json.dumps(body).encode())]
    with pytest.raises(RuntimeError, match=message):
        RerankClient(stub.url, api_key="secret").rank(QUERY, DOCUMENTS)
    assert len(stub.requests) == 1  # a redirect is not followed: the key would go with it


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"<html>", "did not answer in JSON"),
        (b"[]", "no list 'results'"),
        (b'{"results": [{"index": 1, "relevance_score": 0.5}]}', "'index' below 1"),
        (b'{"results": [{"index": true, "relevance_score": 0.5}]}', "'index' below 1"),
        (b'{"results": [{"index": 0, "relevance_score": NaN}]}', "a number as 'relevance_score'"),
        (b'{"results": ["no row"]}', "got 'no row'"),
        (b'{"results": [{"index": 0, "relevance_score": 1}, {"index": 0, "relevance_score": 1}]}', "each once"),
        (b'{"results": []}', "0 results, but 1 were asked for"),
    ],
)
def test_answers_of_another_shape_are_refused(stub, answer, message):
    stub.answers = [(200, {}, answer)]
    with pytest.raises(ValueError, match=message):
        RerankClient(stub.url).rank(QUERY, ["a document"])


def test_no_server_is_one_line(stub):
    client = RerankClient("http://127.0.0.1:9", timeout=5)
    with pytest.raises(ConnectionError, match="http://127.0.0.1:9 cannot be reached: .*; is the server running"):
        client.rank(QUERY, DOCUMENTS)


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8080",
        "ftp://host",
        "http://",
        "file:///etc/passwd",
        "http://host:port",
        "http://host?a=b",
        "http://host#a",
        "http://host/a b",
        "http://host/ä",
        "http://[::1",
    ],
)
def test_bad_urls(url):
    with pytest.raises(ValueError, match="url must be like http://127.0.0.1:8080, got"):
        RerankClient(url)


@pytest.mark.parametrize("url", ["http://user:secret@host", "user:secret@host", "http://user:secret@host:port/a"])
def test_a_password_in_an_url_is_refused_and_not_shown(url):
    with pytest.raises(ValueError, match="without a name; give a key as api_key") as caught:
        RerankClient(url)
    assert "secret" not in str(caught.value)
    assert RerankClient("https://host/models/@me").url == "https://host/models/@me"


@pytest.mark.parametrize("key", ["k\n", "k\r\nX-Evil: 1", "ключ", "a\0"])
def test_a_key_that_no_header_holds_is_refused_and_not_shown(key):
    with pytest.raises(ValueError, match="api_key must be printable Latin-1") as caught:
        RerankClient("http://127.0.0.1:1", api_key=key)
    assert key not in str(caught.value)


def test_documents_without_a_title_are_sent_as_texts(stub):
    """Some servers, such as vLLM, take texts only."""
    given = [{"title": "", "text": "a"}, {"title": None, "text": "b"}, {"text": "c"}, {"title": "d", "text": "e"}]
    RerankClient(stub.url).rank_many([QUERY], [given])
    assert stub.requests[0][2]["documents"] == ["a", "b", "c", {"title": "d", "text": "e"}]


@pytest.mark.parametrize("document", [None, float("nan"), 7, b"a", "\ud800", {"title": "a"}, {"text": None}])
def test_a_bad_document_is_named_as_by_a_reranker(stub, reranker, document):
    texts = ["a", document]
    for call in (
        lambda ranker: ranker.rank(QUERY, texts),
        lambda ranker: ranker.rank_many(["a", QUERY], [["a"], texts]),
        lambda ranker: ranker.predict([(QUERY, text) for text in texts]),
    ):
        errors = []
        for ranker in (RerankClient(stub.url), reranker):
            with pytest.raises((TypeError, ValueError)) as caught:
                call(ranker)
            errors.append((type(caught.value), str(caught.value)))
        assert errors[0] == errors[1]
    assert not stub.requests


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda client: client.rank("", ["a"]), ValueError, "query must have at least one token"),
        (lambda client: client.rank(None, ["a"]), TypeError, "query must be a string, got None"),
        (lambda client: client.rank("a", ["a"], threshold=2), ValueError, "threshold must be a relevance between 0"),
        (lambda client: client.rank("a", ["a"], threshold="0"), TypeError, "threshold must be a number"),
        (lambda client: client.rank_many("ab", [["a"], ["b"]]), TypeError, "queries must be a list"),
        (lambda client: client.rank_many(["a", ""], [["a"], ["b"]]), ValueError, "query 1 must have at least one"),
        (lambda client: client.rank_many(["a", "b"], [["a"]]), ValueError, "2 queries, 1 list of candidates"),
        (lambda client: client.rank_many(["a"], [["a"]], instruction=["b", "c"]), ValueError, "and 2 instructions"),
        (lambda client: client.predict(("a", "b")), TypeError, "pair 0 is the string 'a'"),
        (lambda client: client.predict([("a", "b", "c")]), ValueError, "pair 0 has 3 items"),
    ],
)
def test_bad_arguments_are_found_before_anything_is_sent(stub, call, error, message):
    with pytest.raises(error, match=message):
        call(RerankClient(stub.url))
    assert not stub.requests


def test_generators_are_read_once(stub):
    client = RerankClient(stub.url)
    assert client.predict((QUERY, text) for text in DOCUMENTS).tolist() == RELEVANCE
    found = client.rank_many(iter([QUERY, "moon"]), iter([iter(DOCUMENTS), iter(["moon"])]), instruction=iter("ab"))
    assert [len(rows) for rows in found] == [4, 1]
    assert [body["instruction"] for _, _, body in stub.requests[1:]] == ["a", "b"]


def test_documents_of_the_server_are_named_by_their_ids(stub):
    stub.answers = [(200, {}, b'{"results": [{"index": 0, "relevance_score": 1}]}')]
    assert RerankClient(stub.url).rank(QUERY, [{"id": "d1"}]) == [{"corpus_id": 0, "score": 1.0}]
    assert stub.requests[0][2]["documents"] == [{"id": "d1"}]


@pytest.mark.parametrize("documents", ["some text", {"text": "a"}, {"a", "b"}, None])
def test_documents_must_be_a_list_as_for_a_reranker(stub, reranker, documents):
    for ranker in (RerankClient(stub.url), reranker):
        with pytest.raises(TypeError, match="must be a list"):
            ranker.rank(QUERY, documents)
    assert not stub.requests


def test_what_is_opened(stub, reranker):
    assert Source(reranker).ranker is reranker
    client = Source(stub.url, {"timeout": 3.0}, api_key="k", model="m").ranker
    assert isinstance(client, RerankClient) and (client.timeout, client.model) == (3.0, "m")


def test_an_adapter_is_loaded_with_options():
    demo = Path(qpeft_ext.__file__).parent / "demo"
    found = Source(demo / "adapter", {"base_model": str(demo / "base_lm"), "max_document_tokens": 32}).ranker
    assert isinstance(found, qpeft_ext.Reranker) and found.model.qpeft_config.max_document_tokens == 32


def test_a_threshold_leaves_out_what_is_below(stub):
    client = RerankClient(stub.url)
    assert [row["corpus_id"] for row in client.rank(QUERY, DOCUMENTS, threshold=0.25)] == [1, 0, 3]
    assert stub.requests[0][2]["threshold"] == 0.25  # this stub ignores it
    stub.answers = [(200, {}, b'{"results": []}')] * 2
    assert client.rank(QUERY, DOCUMENTS, threshold=0.9) == []
    with pytest.raises(ValueError, match="0 results, but 4 were asked for"):
        client.rank(QUERY, DOCUMENTS, threshold=0.0)


def test_with_a_threshold_scores_are_relevances_here_as_on_a_server(stub, reranker):
    relevances = reranker.relevance([QUERY] * 4, reranker.predict([(QUERY, text) for text in DOCUMENTS])).tolist()
    order = [row["corpus_id"] for row in reranker.rank(QUERY, DOCUMENTS)]
    rows = [{"corpus_id": place, "score": relevances[place]} for place in order]
    source = Source(reranker, threshold=0.0)
    assert source.rank(QUERY, DOCUMENTS) == rows == source.rank_many([QUERY], [DOCUMENTS])[0]
    assert source.predict([(QUERY, text) for text in DOCUMENTS]) == relevances
    assert Source(reranker, threshold=rows[1]["score"]).rank(QUERY, DOCUMENTS) == rows[:2]
    assert Source(stub.url, threshold=0.5).rank_many([QUERY], [DOCUMENTS]) == [[{"corpus_id": 1, "score": 0.75}]]
    assert Source(stub.url, threshold=0.5).predict([(QUERY, DOCUMENTS[0])]) == [0.25]


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_a_threshold_is_a_relevance(stub, threshold):
    with pytest.raises(ValueError, match="threshold must be a relevance between 0 and 1"):
        Source(stub.url, threshold=threshold)


@pytest.mark.parametrize(
    ("plugin", "imported", "extra"),
    [
        ("haystack", "haystack", "haystack"),
        ("langchain", "langchain_core.callbacks", "langchain"),
        ("llama_index", "llama_index.core.bridge.pydantic", "llama-index"),
        ("mteb", "mteb.models.model_meta", "mteb"),
        ("pyterrier", "pandas", "pyterrier"),
        ("rerankers", "rerankers.documents", "rerankers"),
    ],
)
def test_without_its_package_a_plug_in_says_what_to_install(monkeypatch, plugin, imported, extra):
    monkeypatch.setitem(sys.modules, imported, None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, f"qpeft_ext.integrations.{plugin}", raising=False)
    with pytest.raises(ImportError, match=rf"this plug-in needs .*: pip install 'qpeft_ext\[{extra}\]'"):
        importlib.import_module(f"qpeft_ext.integrations.{plugin}")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((7,), TypeError, "must be a Reranker, the path or Hub id of an adapter, or the URL of a server, got int 7"),
        (("folder", None, "key"), ValueError, "api_key need the URL of a server"),
        (("http://127.0.0.1", {"api_key": "k"}), ValueError, "give api_key itself, not among the options"),
        (("no-such-folder-here/at-all/deep",), (OSError, ValueError), "no-such-folder-here"),
    ],
)
def test_what_cannot_be_opened(arguments, error, message):
    with pytest.raises(error, match=message):
        Source(*arguments)


def test_options_are_not_for_a_reranker_in_memory(reranker):
    with pytest.raises(ValueError, match="options are for an adapter"):
        Source(reranker, {"device": "cpu"})
