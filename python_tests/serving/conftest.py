"""One service around the packaged LM and adapter, and a client that talks to its app without a socket."""

from __future__ import annotations

from pathlib import Path

import pytest

import qpeft_ext
from qpeft_ext.serving.settings import Limits, ServeSpec

DEMO = Path(qpeft_ext.__file__).parent / "demo"
KEY = "a key"
LIMITS = Limits(max_documents=50, max_body_bytes=20_000, body_timeout=60.0, request_timeout=120.0)


def spec(**changes) -> ServeSpec:
    """Return what the tests serve: the packaged adapter, bit-equal scores, a small cache."""
    standard = {
        "models": {"code": str(DEMO / "adapter")},
        "base_model": str(DEMO / "base_lm"),
        "cache_bytes": 32 << 20,
        "lm_options": {"device": "cpu"},
        "reranker_options": {"deterministic": True},
        "limits": LIMITS,
    }
    return ServeSpec(**standard | changes)


@pytest.fixture(scope="package")
def service(tmp_path_factory):
    """A service that asks for a key; adapters below ``models`` may be loaded."""
    for package in ("fastapi", "prometheus_client"):
        pytest.importorskip(package, reason="the extra serve is not installed")
    from qpeft_ext.serving.service import Service

    models = tmp_path_factory.mktemp("served") / "models"
    models.mkdir()
    return Service(spec(api_keys=("another", KEY), models_root=models))


@pytest.fixture(scope="package")
def client(service):
    """A client of the app; it has the key."""
    from starlette.testclient import TestClient

    from qpeft_ext.serving.app import create_app

    with TestClient(create_app(service), headers={"authorization": f"Bearer {KEY}"}) as client:
        assert service.wait_until_loaded(300), service.error
        yield client


@pytest.fixture(scope="package")
def reranker(client, service):
    """The reranker that answers."""
    return service.models.get("code").reranker
