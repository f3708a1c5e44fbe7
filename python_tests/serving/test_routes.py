"""Every route in the form that its clients send and read; the names of the tests tell the rules of real clients."""

import numpy as np
import pytest

QUERY = "Return the items of a list in ascending order"
DOCUMENTS = ["def remove(path): os.remove(path)", "def sort(items): return sorted(items)", "def gcd(a, b): return a"]
PATHS = ("/v2/rerank", "/v1/rerank", "/rerank")


@pytest.fixture(scope="module")
def expected(reranker):
    """Log-likelihoods by `Reranker.predict`."""
    return [float(score) for score in reranker.predict([(QUERY, document) for document in DOCUMENTS])]


def indices(body):
    return [result["index"] for result in body]


@pytest.mark.parametrize("path", PATHS)
def test_raw_scores_are_those_of_rank_to_the_bit(client, reranker, path):
    body = client.post(path, json={"query": QUERY, "documents": DOCUMENTS, "raw_scores": True}).json()
    ranked = reranker.rank(QUERY, DOCUMENTS)
    assert [(r["index"], r["relevance_score"]) for r in body["results"]] == [
        (r["corpus_id"], r["score"]) for r in ranked
    ]


def test_rule_1_rerank_answers_texts_as_tei_and_documents_as_jina(client, expected):
    tei = client.post("/rerank", json={"query": QUERY, "texts": DOCUMENTS, "raw_scores": True}).json()
    assert sorted((r["index"], r["score"]) for r in tei) == list(enumerate(expected))
    assert [r["score"] for r in tei] == sorted(expected, reverse=True)
    jina = client.post("/rerank", json={"query": QUERY, "documents": DOCUMENTS}).json()
    assert set(jina) == {"model", "usage", "id", "results", "meta"}
    assert jina["usage"]["prompt_tokens"] == jina["usage"]["total_tokens"] == jina["meta"]["tokens"]["input_tokens"]


def test_rule_2_both_prefixes_of_every_path(client):
    for path in PATHS:
        assert client.post(path, json={"query": QUERY, "documents": DOCUMENTS}).status_code == 200
    for path in ("/score", "/v1/score"):
        assert client.post(path, json={"text_1": QUERY, "text_2": DOCUMENTS}).status_code == 200


@pytest.mark.parametrize("path", PATHS)
def test_rule_3_null_large_and_unknown_options(client, path):
    options = {"max_tokens_per_doc": None, "top_n": 10**6, "model": None, "return_documents": None, "unheard_of": {}}
    body = client.post(path, json={"query": QUERY, "documents": DOCUMENTS, **options}).json()
    assert len(body["results"]) == 3
    large = client.post(path, json={"query": QUERY, "documents": DOCUMENTS, "max_tokens_per_doc": 4096}).json()
    assert large["results"] == body["results"]
    assert "warnings" not in large["meta"]


@pytest.mark.parametrize(("header", "status"), [
    ("Bearer a key", 200), ("a key", 200), ("bearer another", 200),
    ("Bearer a ke", 401), ("", 401), ("Basic a key", 401),
])  # fmt: skip
def test_rule_4_bearer_and_bare_keys(client, header, status):
    sent = client.post("/rerank", json={"query": QUERY, "texts": DOCUMENTS}, headers={"authorization": header})
    assert sent.status_code == status


@pytest.mark.parametrize("path", PATHS)
def test_rule_5_a_document_is_left_out_unless_asked_for(client, path):
    asked = {"query": QUERY, "documents": [DOCUMENTS[0], {"text": "b", "title": "A"}]}
    assert all("document" not in r for r in client.post(path, json=asked).json()["results"])
    results = client.post(path, json={**asked, "return_documents": True}).json()["results"]
    assert {r["index"]: r["document"] for r in results} == {0: {"text": DOCUMENTS[0]}, 1: {"text": "A b"}}


def test_rule_5_the_text_of_tei_is_left_out_unless_asked_for(client):
    asked = {"query": QUERY, "texts": DOCUMENTS}
    assert all(set(r) == {"index", "score"} for r in client.post("/rerank", json=asked).json())
    texts = client.post("/rerank", json={**asked, "return_text": True}).json()
    assert {r["index"]: r["text"] for r in texts} == dict(enumerate(DOCUMENTS))


@pytest.mark.parametrize(("path", "body", "status", "keys"), [
    ("/v2/rerank", {"query": QUERY, "documents": 3}, 400, {"message"}),
    ("/v1/rerank", {"query": QUERY, "documents": 3}, 422, {"detail", "message", "error"}),
    ("/rerank", {"query": QUERY}, 422, {"detail", "message", "error"}),
    ("/rerank", {"query": QUERY, "texts": 3}, 422, {"error", "error_type"}),
    ("/rerank", {"query": QUERY, "texts": []}, 400, {"error", "error_type"}),
    ("/score", {"text_1": QUERY}, 400, {"error"}),
])  # fmt: skip
def test_rule_6_one_shape_of_errors_per_route(client, path, body, status, keys):
    answer = client.post(path, json=body)
    assert answer.status_code == status
    assert answer.json().keys() == keys
    if "error_type" in keys:
        assert isinstance(answer.json()["error"], str)
    elif "error" in keys:
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(("top_n", "count"), [(None, 3), (0, 3), (1, 1), (2, 2), (9, 3)])
def test_rule_7_top_n_of_none_and_0_is_all(client, top_n, count):
    for path in PATHS:
        body = client.post(path, json={"query": QUERY, "documents": DOCUMENTS, "top_n": top_n}).json()
        assert len(body["results"]) == count


@pytest.mark.parametrize("path", [*PATHS, "/score", "/v1/score", "/v1/models"])
def test_rule_8_every_route_that_works_needs_the_key(client, path):
    body = {"query": QUERY, "documents": DOCUMENTS}
    answer = client.post(path, json=body, headers={"authorization": "Bearer wrong"})
    assert answer.status_code == 401
    assert "key" in str(answer.json())
    assert client.get("/info", headers={"authorization": ""}).status_code == 401
    for path in ("/health", "/ping", "/ready", "/metrics"):
        assert client.get(path, headers={"authorization": ""}).status_code == 200


@pytest.mark.parametrize(("first", "second"), [
    ("queries", "documents"), ("queries", "items"), ("text_1", "text_2"), ("data_1", "data_2"),
])  # fmt: skip
def test_score_takes_every_pair_of_names(client, expected, first, second):
    body = client.post("/score", json={first: QUERY, second: DOCUMENTS, "raw_scores": True}).json()
    assert body["object"] == "list"
    assert [(r["index"], r["object"], r["score"]) for r in body["data"]] == [
        (i, "score", score) for i, score in enumerate(expected)
    ]


def test_score_pairs_text_with_text(client, reranker):
    queries, documents = [QUERY, "Delete a file"], DOCUMENTS[:2]
    body = client.post("/v1/score", json={"text_1": queries, "text_2": documents, "use_activation": False}).json()
    assert [r["score"] for r in body["data"]] == reranker.predict(list(zip(queries, documents, strict=True))).tolist()
    wrong = client.post("/score", json={"text_1": queries, "text_2": DOCUMENTS})
    assert wrong.status_code == 400
    assert "got 2 and 3" in wrong.json()["error"]["message"]


def test_relevances_are_absolute_and_keep_the_order_of_the_scores(client, expected):
    body = client.post("/v1/rerank", json={"query": QUERY, "documents": DOCUMENTS}).json()["results"]
    assert indices(body) == np.argsort(-np.array(expected), kind="stable").tolist()
    relevance = {r["index"]: r["relevance_score"] for r in body}
    assert all(0 <= value <= 1 for value in relevance.values())
    alone = client.post("/v1/rerank", json={"query": QUERY, "documents": DOCUMENTS[1:2]}).json()["results"]
    assert alone[0]["relevance_score"] == relevance[1]  # whatever other documents the request has


def test_threshold_leaves_out_what_is_below(client):
    asked = {"query": QUERY, "documents": DOCUMENTS}
    every = client.post("/v1/rerank", json=asked).json()["results"]
    middle = every[1]["relevance_score"]
    assert client.post("/v1/rerank", json={**asked, "threshold": middle}).json()["results"] == every[:2]


def test_long_texts_are_cut_and_reported(client, reranker):
    prompt = reranker.model.prompt
    long = "word " * (prompt.max_document_tokens + 50)
    query = "find " * (prompt.max_query_tokens + 5)
    body = client.post("/v2/rerank", json={"query": query, "documents": [long, "short"]}).json()
    warnings = body["meta"]["warnings"]
    assert [warning.split(" was cut to ")[0] for warning in warnings] == ["query", "documents[0]"]
    left = client.post("/rerank", json={"query": "find", "texts": [long], "truncation_direction": "Left"})
    assert left.status_code == 422
    assert left.json()["error_type"] == "validation"


def test_limits_of_a_request_cut_to_the_first_tokens(client, reranker):
    prompt = reranker.model.prompt
    document = "def largest(values):\n    return max(values)"
    end = prompt.offsets(document)[4][1]  # five tokens
    asked = {"query": QUERY, "documents": [document], "raw_scores": True, "max_tokens_per_doc": 5}
    body = client.post("/v1/rerank", json=asked).json()
    assert body["meta"]["warnings"] == ["documents[0] was cut to 5 tokens"]
    assert body["results"][0]["relevance_score"] == reranker.predict([(QUERY, document[:end])])[0]
    first = QUERY[: prompt.offsets(QUERY)[1][1]]
    asked = {"query": QUERY, "documents": [document], "raw_scores": True, "max_tokens_per_query": 2}
    body = client.post("/v1/rerank", json=asked).json()
    assert body["results"][0]["relevance_score"] == reranker.predict([(first, document)])[0]


def test_what_was_read_before_is_reported_as_cached(client, reranker):
    asked = {"query": QUERY, "documents": ["a document that no other test has", "and one more of them"]}
    prompt = reranker.model.prompt
    tokens = sum(len(prefix.ids) for prefix in prompt.documents(asked["documents"]))
    first, second = (client.post("/v2/rerank", json=asked) for _ in range(2))
    assert first.json()["meta"]["cached_tokens"] == 0
    assert second.json()["meta"]["cached_tokens"] == tokens
    assert second.headers["x-cached-tokens"] == str(tokens)
    assert {"x-request-id", "x-total-time", "x-queue-time", "x-inference-time"} <= set(second.headers.keys())


def test_rank_fields_choose_what_is_read(client, reranker):
    document = {"name": "sort", "body": "return sorted(items)", "text": "other"}
    asked = {"query": QUERY, "documents": [document], "rank_fields": ["name", "body"], "raw_scores": True}
    score = client.post("/v1/rerank", json=asked).json()["results"][0]["relevance_score"]
    assert score == reranker.predict([(QUERY, "sort return sorted(items)")])[0]


@pytest.mark.parametrize(("document", "fields", "read"), [
    ({"copy": "sorted(items)", "text": "other"}, ["copy"], "sorted(items)"),  # what the class has under these names
    ({"json": "sorted", "schema": "(items)"}, ["json", "schema"], "sorted (items)"),
    ({"a": {"é": [1, None, True]}, "b": 2.5}, ["a", "b"], '{"é": [1, null, true]} 2.5'),
    ({"a": None, "b": "sorted(items)"}, ["a", "b", "c"], "sorted(items)"),
    ({"a": None}, ["a"], ""),
    ({"id": 7, "title": "sorted", "text": "items"}, ["title"], "sorted"),
])  # fmt: skip
def test_rank_fields_are_the_fields_of_the_request_and_nothing_else(client, reranker, document, fields, read):
    asked = {"query": QUERY, "documents": [document], "rank_fields": fields}
    body = client.post("/v1/rerank", json=asked | {"raw_scores": True, "return_documents": True}).json()
    (result,) = body["results"]
    assert result["document"]["text"] == read
    assert result["relevance_score"] == reranker.predict([(QUERY, read)])[0]


@pytest.mark.parametrize("fields", [["record"], ["__dict__"], ["model_config"], ["name"]])
def test_a_document_without_any_of_the_rank_fields_is_refused(client, fields):
    asked = {"query": QUERY, "documents": ["a", {"text": "b"}], "rank_fields": fields}
    answer = client.post("/v1/rerank", json=asked)
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("documents[1] must be a text, or have")


@pytest.mark.parametrize("title", ["A title", "  A title", " ", "\n\tA", ""])
def test_a_title_with_white_space_before_it_loses_nothing_when_the_document_is_cut(client, reranker, title):
    document = {"title": title, "text": "def largest(values): return max(values)"}
    whole = f"{title} {document['text']}".strip()
    for limit in (1, 3, 5, 8):
        cut = whole[: reranker.model.prompt.offsets(whole)[limit - 1][1]]
        asked = {"query": QUERY, "documents": [document], "max_tokens_per_doc": limit, "return_documents": True}
        (result,) = client.post("/v1/rerank", json=asked | {"raw_scores": True}).json()["results"]
        assert result["document"]["text"] == cut.strip()
        assert result["relevance_score"] == reranker.predict([(QUERY, cut)])[0]


@pytest.mark.parametrize("path", [*PATHS, "/score"])
def test_options_of_vllm_work_on_all_its_routes(client, reranker, expected, path):
    """On /v2/rerank and /score, too, which vLLM has and Cohere's and ours are."""
    asked, key = {"query": QUERY, "queries": QUERY, "documents": DOCUMENTS}, "data" if path == "/score" else "results"

    def scores(**options):
        rows = client.post(path, json=asked | options).json()[key]
        return [row.get("score", row.get("relevance_score")) for row in sorted(rows, key=lambda row: row["index"])]

    assert scores(use_activation=False) == expected
    first = QUERY[: reranker.model.prompt.offsets(QUERY)[1][1]]
    assert scores(use_activation=False, max_tokens_per_query=2) == [
        float(score) for score in reranker.predict([(first, document) for document in DOCUMENTS])
    ]
    short = asked | {"max_tokens_per_doc": 2}
    assert client.post(path, json=short | {"truncation_side": "right"}).status_code == 200
    refused = client.post(path, json=short | {"truncation_side": "left"})
    assert refused.status_code in (400, 422) and "cut at their end only" in refused.text


def test_the_description_has_no_option_without_effect(client):
    """Scores of pairs are neither left out nor have spans."""
    described = client.get("/openapi.json").json()["components"]["schemas"]["ScoreRequest"]["properties"]
    assert not {"threshold", "relevant_spans", "top_n"} & described.keys()


@pytest.mark.parametrize("path", ["/v1/rerank/", "//v1/rerank", "//v1/rerank//"])
def test_slashes_around_a_path_make_no_difference_and_nothing_is_redirected(client, path):
    asked = {"query": QUERY, "documents": DOCUMENTS}
    url = f"http://elsewhere.example{path}"  # a client takes its key to where a redirect points
    answer = client.post(url, json=asked, follow_redirects=False)
    assert answer.status_code == 200
    assert answer.json()["results"] == client.post("/v1/rerank", json=asked).json()["results"]


def test_head_is_answered_as_get(client):
    for path in ("/health", "/ping", "/ready", "/metrics", "/info", "/v1/models"):
        assert client.head(path).status_code == client.get(path).status_code == 200


def test_what_is_not_there_is_an_error_of_every_shape(client):
    for method, path, status in (("POST", "/v3/rerank", 404), ("GET", "/v2/rerank", 405), ("PUT", "/v1/models", 405)):
        answer = client.request(method, path, json={})
        body = answer.json()
        assert (answer.status_code, body["error"]["code"]) == (status, status)
        assert body["detail"] == body["message"] == body["error"]["message"]
        assert ("allow" in answer.headers) == (status == 405)
    assert set(client.put("/v1/models").headers["allow"].split(", ")) >= {"GET"}


def test_metrics_count_requests_and_tokens(client):
    client.post("/v2/rerank", json={"query": QUERY, "documents": DOCUMENTS})
    page = client.get("/metrics").text
    for name in (
        "qpeft_requests_total{",
        "qpeft_tokens_computed_total ",
        'qpeft_cache_bytes{tier="device"}',
        "qpeft_queue_seconds_bucket",
        "qpeft_batch_tokens_bucket",
        "process_resident_memory_bytes",
    ):
        assert f"\n{name}" in page, name


def test_the_description_names_every_field(client):
    page = client.get("/openapi.json").json()
    assert {"/v2/rerank", "/v1/rerank", "/rerank", "/score", "/v1/score", "/v1/models"} <= page["paths"].keys()
    schemas = page["components"]["schemas"]
    assert {"CohereRequest", "RerankRequest", "TeiRequest", "ScoreRequest", "CohereResponse"} <= schemas.keys()
    assert {"query", "documents", "top_n", "max_tokens_per_doc"} <= schemas["CohereRequest"]["properties"].keys()


def test_relevances_are_those_of_the_reranker(client, reranker, expected):
    body = client.post("/v1/rerank", json={"query": QUERY, "documents": DOCUMENTS}).json()["results"]
    found = [r["relevance_score"] for r in sorted(body, key=lambda r: r["index"])]
    np.testing.assert_allclose(found, reranker.relevance([QUERY] * 3, expected), rtol=1e-12)


def test_an_instruction_is_read_and_caches_stay_valid(client, reranker):
    asked = {"query": QUERY, "documents": DOCUMENTS, "raw_scores": True, "instruction": "Find the slowest one."}
    body = client.post("/v2/rerank", json=asked).json()
    ranked = reranker.rank(QUERY, DOCUMENTS, instruction="Find the slowest one.")
    assert [r["relevance_score"] for r in body["results"]] == [r["score"] for r in ranked]
    assert body["meta"]["cached_tokens"] > 0
    blank = client.post("/v2/rerank", json={**asked, "instruction": " "}).json()["results"]
    assert blank == client.post("/v2/rerank", json={**asked, "instruction": None}).json()["results"]


def test_spans_are_those_of_the_reranker(client, reranker):
    document = {"title": "Lists", "text": "def sort(items): return sorted(items)  # in ascending order"}
    asked = {"query": QUERY, "documents": [document], "relevant_spans": {"mode": "enabled", "max_spans": 2}}
    (result,) = client.post("/v2/rerank", json=asked).json()["results"]
    assert [(s["start"], s["end"], s["score"]) for s in result["relevant_spans"]] == [
        (span.start, span.end, span.score) for span in reranker.spans(QUERY, document, max_spans=2)
    ]
    asked["relevant_spans"] = {"mode": "disabled"}
    assert "relevant_spans" not in client.post("/v2/rerank", json=asked).json()["results"][0]
