"""Spans of a request are found in a thread of their own: others do not wait for them."""

import threading

import pytest

DOCUMENTS = ["def sort(items): return sorted(items)", "def remove(path): os.remove(path)"]
ASKED = {"query": "sort a list", "documents": DOCUMENTS}
WITH_SPANS = ASKED | {"relevant_spans": {"mode": "enabled"}}
SECONDS = 60


@pytest.fixture
def held(reranker, monkeypatch):
    """Spans are not found until ``go_on`` is set; ``entered`` has the documents for which they are wanted."""
    entered, begun, go_on, find = [], threading.Event(), threading.Event(), reranker.spans

    def spans(query, document, **options):
        entered.append(document)
        begun.set()
        assert go_on.wait(SECONDS)
        return find(query, document, **options)

    monkeypatch.setattr(reranker, "spans", spans)
    yield entered, begun, go_on
    go_on.set()


def test_others_are_answered_while_spans_are_found(client, held):
    entered, begun, go_on = held
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(client.post("/v2/rerank", json=WITH_SPANS).json()))
        for _ in range(5)  # more than there are threads for everything else
    ]
    for thread in threads:
        thread.start()
    assert begun.wait(SECONDS)
    assert client.post("/v2/rerank", json=ASKED).status_code == 200
    assert not answers and len(entered) == 1
    go_on.set()
    for thread in threads:
        thread.join(SECONDS)
    assert [len(answer["results"]) for answer in answers] == [2] * 5
    assert all(result["relevant_spans"] for answer in answers for result in answer["results"])


def test_a_request_that_takes_too_long_ends_the_search(client, service, held, monkeypatch):
    entered, begun, go_on = held
    monkeypatch.setitem(service.spec.limits.__dict__, "request_timeout", 1.0)
    assert client.post("/v2/rerank", json=WITH_SPANS).status_code == 504
    go_on.set()
    service.spans_pool.submit(int).result(SECONDS)  # the search before it has ended
    assert len(entered) <= 1  # not the second document
    monkeypatch.undo()
    assert client.post("/v2/rerank", json=WITH_SPANS).json()["results"][0]["relevant_spans"]
