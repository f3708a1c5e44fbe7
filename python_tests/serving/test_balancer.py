"""Requests in front of replicas: which one is asked, what happens when it cannot answer, and pages of all of them."""

import asyncio
import json
import os
import random
from collections import Counter

import pytest
from serving.tiny_service import KEY, spec

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from starlette.testclient import TestClient

from qpeft_ext.serving.balancer import Answer, Balancer, document_key
from qpeft_ext.serving.metrics import one_page

ASKED = {"query": "sort a list", "documents": ["sorted(items)", "os.remove(path)"]}
WITH_KEY = {"authorization": f"Bearer {KEY}"}


class Replica:
    """Answers with its name; `status` may be that of an overloaded one, None stands for a process that is gone."""

    def __init__(self, name):
        self.name, self.status, self.asked = name, 200, []

    async def ask(self, request):
        self.asked.append(request)
        if self.status is None:
            raise ConnectionError
        body = json.dumps({"name": self.name, "status": "ready" if self.status == 200 else "not ready"}).encode()
        return Answer(self.status, ((b"content-type", b"application/json"),), body, request.path, {})


@pytest.fixture
def replicas():
    return [Replica(i) for i in range(4)]


@pytest.fixture
def front(replicas):
    return TestClient(Balancer(spec(api_keys=(KEY,)), replicas), headers=WITH_KEY)


def asks(front, documents, query="a query"):
    """Return the name of the replica that answers."""
    return front.post("/v1/rerank", json={"query": query, "documents": documents}).json()["name"]


def test_the_same_documents_go_to_the_same_replica_and_others_spread(front):
    draw = random.Random(0)
    found = Counter()
    for i in range(60):
        documents = [f"document {i} {j}" for j in range(5)]
        first = asks(front, documents)
        draw.shuffle(documents)
        assert asks(front, documents, "another query") == first
        found[first] += 1
    assert len(found) == 4 and max(found.values()) < 30


def test_the_key_is_of_the_documents_alone_whatever_the_api():
    documents = ["a", "b", "c"]
    same = [
        {"query": "x", "documents": documents}, {"query": "y", "texts": documents[::-1], "top_n": 1},
        {"text_1": "z", "text_2": documents}, {"queries": ["z"], "items": documents},
        {"documents": [{"text": text} for text in documents]},
    ]  # fmt: skip
    assert len({document_key(json.dumps(body).encode()) for body in same}) == 1
    others = [["a", "x"], "a", [{"id": "d1"}], [{"id": "d2"}], [{"text": "a", "title": "t"}]]
    assert len({document_key(json.dumps({"documents": each}).encode()) for each in others}) >= 4
    for body in (b"", b"[", b"[]", b"3", b"\xff", b'{"documents": {}}', b'{"documents": []}', b'{"documents": null}'):
        assert document_key(body) == b""
    assert document_key(b'{"documents": [null, 3, [], {"text": null}]}') != b""


@pytest.mark.parametrize("status", [None, 503, 429])
def test_another_replica_answers_for_one_that_cannot(front, replicas, status):
    first = asks(front, ["a"])
    replicas[first].status = status
    second = asks(front, ["a"])
    assert second != first
    assert asks(front, ["a"]) == second
    replicas[first].status = 200
    assert asks(front, ["a"]) == first


def test_when_no_replica_can_answer_the_error_is_clear(front, replicas):
    for replica in replicas:
        replica.status = None
    answer = front.post("/v1/rerank", json=ASKED)
    assert answer.status_code == 503 and answer.headers["retry-after"] == "5"
    assert answer.json()["detail"].startswith("no replica runs")
    replicas[2].status = 503
    assert front.post("/v1/rerank", json=ASKED).json()["name"] == 2
    assert front.get("/ready").status_code == 503


def test_a_body_that_is_too_large_or_has_no_key_goes_no_further(front, replicas):
    assert front.post("/v1/rerank", content=b"x" * 30_000).status_code == 413
    assert not any(replica.asked for replica in replicas)
    front.post("/v1/rerank", json=ASKED, headers={"authorization": "Bearer wrong"})
    (request,) = [request for replica in replicas for request in replica.asked]
    assert request.body == b""


def test_models_are_those_of_the_start(front, replicas):
    for answer in (front.post("/v1/models", json={}), front.delete("/v1/models/code")):
        assert answer.status_code == 403 and "--engine ray" in answer.json()["error"]["message"]
    assert front.get("/v1/models").status_code == 200


def test_ready_while_one_replica_is(front, replicas):
    for replica in replicas[1:]:
        replica.status = None
    found = front.get("/ready").json()
    assert found["status"] == "ready"
    assert [each["status"] for each in found["replicas"]] == ["ready", "not ready", "not ready", "not ready"]
    assert front.get("/health").json() == {"status": "ok"}


def test_a_client_that_leaves_ends_the_call_of_its_replica():
    class Slow:
        ended = False

        async def ask(self, request):
            try:
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                self.ended = True
                raise

    slow = Slow()
    messages = [{"type": "http.request", "body": b"{}", "more_body": False}, {"type": "http.disconnect"}]
    sent = []

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/rerank", "headers": [], "query_string": b"", "root_path": ""}

    async def run():
        await Balancer(spec(), [slow])(scope, receive, send)
        await asyncio.sleep(0)

    asyncio.run(run())
    assert sent[0]["status"] == 499 and slow.ended


def test_pages_of_metrics_become_one():
    page = '# HELP a_total A.\n# TYPE a_total counter\na_total{route="x"} 3.0\n'
    whole = one_page({"0": page, "1": page.replace("3.0", "4.0")}).decode()
    assert whole.count("# TYPE a_total counter") == 1
    assert 'a_total{replica="0",route="x"} 3.0' in whole and 'a_total{replica="1",route="x"} 4.0' in whole


def test_replicas_score_as_one_server_does(client, service):
    """The class that runs in Ray's actors, without Ray."""
    from qpeft_ext.serving.ray_replicas import _Replica

    made = []
    try:
        for _ in range(2):  # one after the other: transformers cannot load two LMs at a time in one process
            made.append(_Replica(service.spec, os.getcwd()))
            assert asyncio.run(made[-1].why_not_loaded()) == ""
            made[-1].check_health()
        front = TestClient(Balancer(service.spec, made), headers=WITH_KEY)
        lists = [[f"def item_{i}_{j}(values): return values[{j}]" for j in range(3)] for i in range(8)]
        for route in ("/v1/rerank", "/v2/rerank", "/score"):
            query = {"query": "the first item", "queries": "the first item"}
            asked = [query | {"documents": documents} for documents in lists]
            ours = [front.post(route, json=body).json() for body in asked]
            alone = [client.post(route, json=body).json() for body in asked]
            key = "data" if route == "/score" else "results"
            assert [each[key] for each in ours] == [each[key] for each in alone]
        assert all(each["meta"]["cached_tokens"] > 0 for each in ours)
        scored = [each._service.metrics.registry.get_sample_value("qpeft_pairs_total") for each in made]
        assert min(scored) > 2  # each had some of the lists
        for body in (b"[", b"{}", b'{"query": " ", "documents": ["a"]}'):
            ours, alone = front.post("/v1/rerank", content=body), client.post("/v1/rerank", content=body)
            assert (ours.status_code, ours.json()) == (alone.status_code, alone.json())
        assert front.post("/v1/rerank", json=ASKED, headers={"authorization": "x"}).status_code == 401
        assert 'qpeft_pairs_total{replica="1"}' in front.get("/metrics").text
        assert front.get("/ready").json()["status"] == front.get("/ready").json()["replicas"][0]["status"]
        assert front.get("/info").json()["max_documents"] == 50
    finally:
        for each in made:
            each._service.stop()
