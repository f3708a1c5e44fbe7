"""Health and readiness, and a score that is known: a template that got lost would change it."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from serving.tiny_service import spec

from qpeft_ext.serving.errors import RequestError


def test_a_known_score(client):
    """The example of `Reranker.rank`'s documentation."""
    asked = {
        "query": "sort the items of a list",
        "documents": ["Return a new list with the items of the iterable in ascending order."],
        "raw_scores": True,
    }
    (result,) = client.post("/v1/rerank", json=asked).json()["results"]
    assert result["relevance_score"] == pytest.approx(-17.87, abs=0.05)  # the LM is stored in bfloat16


def test_ready_runs_a_pass_when_the_last_one_is_old(client, service, monkeypatch):
    before = service.metrics.registry.get_sample_value("qpeft_pairs_total")
    service.scoring.last_success = -1e9
    assert client.get("/ready").json() == {"status": "ready"}
    assert service.metrics.registry.get_sample_value("qpeft_pairs_total") == before + 1
    assert client.get("/ready").json() == {"status": "ready"}  # by the pass before
    assert service.metrics.registry.get_sample_value("qpeft_pairs_total") == before + 1


def test_ready_is_red_when_the_model_fails_and_green_again(client, service, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("CUDA error: device-side assert triggered")

    reranker = service.models.get("code").reranker
    with monkeypatch.context() as patch:
        patch.setattr(reranker, "score", fail)
        service.scoring.last_success = -1e9
        answer = client.get("/ready")
        assert (answer.status_code, answer.json()["status"]) == (503, "not ready")
        assert client.get("/health").status_code == 200
    assert client.get("/ready").status_code == 200


def test_a_service_is_red_until_its_model_is_loaded_and_says_why_it_failed(tmp_path):
    pytest.importorskip("prometheus_client", reason="the extra serve is not installed")
    from qpeft_ext.serving.service import Service

    service = Service(spec(models={"broken": str(tmp_path)}, cache_bytes=0))
    assert asyncio.run(service.why_not_ready()).startswith("the model is being loaded")
    assert service.alive
    failed = []
    service._load(lambda: failed.append(True))
    assert failed and "adapter_config.json" in str(service.error)
    assert not service.alive
    service.stop()
    with pytest.raises(RequestError, match="shutting down"):
        service.expect_loaded()


def test_health_is_red_when_the_scoring_thread_has_ended(client, service, monkeypatch):
    monkeypatch.setattr(service, "scoring", SimpleNamespace(is_alive=lambda: False, healthy=True, last_success=-1e9))
    assert client.get("/health").status_code == 503
    assert client.get("/ping").status_code == 503
    assert json.loads(client.get("/ready").content)["reason"] == "the scoring thread has ended"
