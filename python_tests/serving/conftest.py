"""One service around the packaged LM and adapter, and a client that talks to its app without a socket."""

from __future__ import annotations

import pytest
from serving.tiny_service import KEY, spec


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
