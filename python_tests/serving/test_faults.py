"""Requests that are too large, too slow, broken or given up: a clear answer, and the next one works."""

import asyncio
import json
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from qpeft_ext.serving.errors import RequestError
from qpeft_ext.serving.service import running_pool

ASKED = {"query": "sort a list", "documents": ["sorted(items)", "os.remove(path)"]}
ROUTES = ("/v2/rerank", "/v1/rerank", "/rerank", "/score", "/v1/score", "/v1/models")
DEEP = b'{"query":' * 3000


@pytest.fixture
def blocked(service):
    """Keeps the scoring thread from scoring until it is called."""
    entered, go_on = threading.Event(), threading.Event()

    def hold():
        with service.models.get("code").reranker.exclusive():
            entered.set()
            go_on.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert entered.wait(60)
    yield go_on.set
    go_on.set()
    thread.join()


def ask(client, messages, body=b""):
    """Send raw ASGI messages to the app; returns the status of its answer, and its body."""
    sent = []
    scope = {
        "type": "http", "method": "POST", "path": "/v1/rerank", "raw_path": b"/v1/rerank", "query_string": b"",
        "headers": [(b"authorization", b"a key")], "http_version": "1.1", "scheme": "http", "root_path": "",
        "client": ("test", 1), "server": ("test", 80), "asgi": {"version": "3.0"},
    }  # fmt: skip

    async def run():
        pending = list(messages)

        async def receive():
            if not pending:
                await asyncio.sleep(600)
            message = pending.pop(0)
            return message if isinstance(message, dict) else await message()

        async def send(message):
            sent.append(message)

        await client.app(scope, receive, send)

    client.portal.call(run)
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:]))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("body", [
    b"", b"[", b"[]", b"3", b"null", b"\xff\xfe", DEEP, b'{"query": "\\ud800", "documents": ["a"]}',
    b'{"query": "a", "documents": ["\\ud800"]}', b'{"query": NaN, "documents": [1]}',
    b'{"query": "a", "documents": {}}',
    b'{"query": " ", "documents": ["a"]}', b'{"query": "a", "documents": [{}]}', b'{"query": "a", "documents": [null]}',
    b'{"query": "a", "documents": ["b"], "top_n": -1}', b'{"query": "a", "documents": ["b"], "top_n": 1e400}',
    b'{"query": "a", "documents": ["b"], "model": "unknown"}', b'{"query": "a", "documents": [{"id": "d1"}]}',
    b'{"queries": ["a", "b"], "documents": ["b", "c", "d"]}', b'{"query": "a", "documents": ["b"], "threshold": "x"}',
])  # fmt: skip
def test_a_bad_body_is_refused_in_one_line(client, route, body):
    answer = client.post(route, content=body)
    assert 400 <= answer.status_code < 500
    text = answer.json()
    message = text.get("detail") or text.get("message") or text["error"]
    message = message["message"] if isinstance(message, dict) else message
    assert message and "\n" not in message


def test_the_next_request_is_answered_after_bad_ones(client):
    for body in (b"[", DEEP, b"{}"):
        client.post("/rerank", content=body)
    assert client.post("/rerank", json=ASKED).status_code == 200


def test_too_many_documents_and_too_many_bytes(client):
    many = client.post("/v1/rerank", json={"query": "a", "documents": ["b"] * 51})
    assert many.status_code == 422
    assert "documents has 51 items, this server takes 50" in many.json()["detail"]
    large = client.post("/v1/rerank", json={"query": "a", "documents": ["b" * 30_000]})
    assert large.status_code == 413
    streamed = client.post("/v1/rerank", content=(b"x" * 1000 for _ in range(30)))  # of a length that nobody knows
    assert streamed.status_code == 413


def test_a_body_that_does_not_come_is_given_up(client, service):
    object.__setattr__(service.spec.limits, "body_timeout", 0.2)
    try:
        part = {"type": "http.request", "body": b'{"query"', "more_body": True}
        status, body = ask(client, [part])
    finally:
        object.__setattr__(service.spec.limits, "body_timeout", 60.0)
    assert (status, body["detail"]) == (408, "the body did not arrive within 0.2 s")


def test_a_client_that_leaves_drops_its_work(client, service, blocked):
    whole = {"type": "http.request", "body": json.dumps(ASKED).encode(), "more_body": False}

    async def leave():
        while not len(service.scoring.waiting):
            await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    # the first request may be in a pass already; the second waits, and is dropped without having been scored
    status, _ = ask(client, [whole, leave])
    assert status == 499
    passes = service.metrics.registry.get_sample_value("qpeft_pairs_total")
    blocked()
    assert client.post("/rerank", json=ASKED).status_code == 200
    assert service.metrics.registry.get_sample_value("qpeft_pairs_total") - passes <= 6  # with an empty document each
    for _ in range(1000):  # the thread forgets a request when it looks at the queue again
        if not service.scoring.waiting.tokens:
            break
        time.sleep(0.01)
    assert service.scoring.waiting.tokens == 0


def test_a_request_that_takes_too_long_is_given_up(client, service, blocked):
    object.__setattr__(service.spec.limits, "request_timeout", 0.2)
    try:
        answer = client.post("/v2/rerank", json=ASKED)
    finally:
        object.__setattr__(service.spec.limits, "request_timeout", 120.0)
    assert answer.status_code == 504
    blocked()
    assert client.post("/v2/rerank", json=ASKED).status_code == 200


def test_a_full_queue_answers_429_with_retry_after(client, service, blocked):
    waiting = service.scoring.waiting
    waiting.tokens += 10**9
    try:
        for route in ("/v2/rerank", "/v1/rerank", "/rerank"):
            answer = client.post(route, json=ASKED)
            assert answer.status_code == 429
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert client.post("/rerank", json={"query": "a", "texts": ["b"]}).json()["error_type"] == "overloaded"
    finally:
        waiting.tokens -= 10**9


@pytest.mark.parametrize("route", [*ROUTES, "/metrics", "/info"])
def test_a_lack_of_memory_is_503_and_the_log_says_where(client, service, monkeypatch, caplog, route):
    def fail(*arguments):
        raise RuntimeError("can't start new thread for a secret")

    asked = ("GET", route, None) if route in ("/metrics", "/info") else ("POST", route, ASKED)
    with monkeypatch.context() as patch, caplog.at_level("INFO", logger="qpeft_ext.serving"):
        for pool in (service.pool, service.state_pool, service.loading_pool):
            patch.setattr(pool, "submit", fail)
        answer = client.request(*asked[:2], json=asked[2])
    assert answer.status_code == 503 and answer.headers["retry-after"] == "5"
    assert "out of memory" in answer.text and "secret" not in answer.text + caplog.text
    assert f"a request failed (not_ready): RuntimeError at {__name__}:" in caplog.text
    assert client.request(*asked[:2], json=asked[2]).status_code != 503


@pytest.fixture
def busy(service):
    """Keeps threads of a pool from working until it is called."""
    go_on = threading.Event()

    def hold(pool, threads):
        held = threading.Barrier(threads + 1)
        for _ in range(threads):
            pool.submit(lambda: (held.wait(60), go_on.wait(60)))
        held.wait(60)
        return go_on.set

    yield hold
    go_on.set()


def test_pages_do_not_wait_for_texts_of_requests(client, service, busy):
    busy(service.pool, 4)
    service.scoring.last_success = -1e9  # so that /ready makes a pass
    for path in ("/health", "/ready", "/metrics", "/info", "/v1/models"):
        assert client.get(path).status_code == 200


def test_requests_do_not_wait_for_models_that_are_loaded(client, service, busy):
    go_on = busy(service.loading_pool, 1)
    bodies = [{"name": f"m{i}", "adapter": "none"} for i in range(6)]
    loads = [threading.Thread(target=client.post, args=("/v1/models",), kwargs={"json": body}) for body in bodies]
    for load in loads:
        load.start()
    assert client.post("/rerank", json=ASKED).status_code == 200
    go_on()
    for load in loads:
        load.join(60)


def test_a_client_that_leaves_while_its_texts_are_read_is_not_waited_for(client, service, monkeypatch):
    """Texts of some megabytes take seconds; what they would have asked for does not come into the queue."""
    entered, go_on, ended, raised, submit = *(threading.Event() for _ in range(3)), [], service.submit

    def slow(asked, given_up):
        entered.set()
        go_on.wait(60)
        try:
            return submit(asked, given_up)
        except RequestError as error:
            raised.append(error.kind)
            raise
        finally:
            ended.set()

    async def leave():
        while not entered.is_set():
            await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    monkeypatch.setattr(service, "submit", slow)
    whole = {"type": "http.request", "body": json.dumps(ASKED).encode(), "more_body": False}
    status, _ = ask(client, [whole, leave])
    go_on.set()
    assert status == 499 and ended.wait(60)
    assert raised == ["cancelled"]


def test_pools_need_no_new_threads(monkeypatch):
    pool, all_run = running_pool(3, "test"), threading.Barrier(4)

    def fail(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    waits = [pool.submit(all_run.wait, 60) for _ in range(3)]
    all_run.wait(60)  # fails unless each of the three has a thread of its own
    assert {each.result(60) for each in waits} <= {0, 1, 2, 3}
    pool.shutdown()


def test_the_log_has_no_text_path_or_key(client, caplog):
    with caplog.at_level("INFO", logger="qpeft_ext.serving"):  # other tests set the level of the package
        client.post("/v1/rerank?key=hidden", json={"query": "secret words", "documents": ["hidden text"]})
        client.get("/nowhere/secret")
    lines = [json.loads(r.message) for r in caplog.records if r.name == "qpeft_ext.serving.access_log"]
    assert [(line["route"], line["status"]) for line in lines] == [("/v1/rerank", 200), ("other", 404)]
    assert lines[0]["documents"] == 1
    ours = [r.message for r in caplog.records if not r.name.startswith("httpx")]  # the client of the test logs, too
    assert not any(word in message for word in ("secret", "hidden", "a key") for message in ours)
