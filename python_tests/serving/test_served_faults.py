"""A handful of the faults that `make fuzz-serve` makes by the thousand, over a real socket."""

import socket
import sys
import threading
import time

import pytest
from fuzz.no_room import GIVES_BACK, TOKENS, make_wide_model, no_room
from fuzz.serve_faults import Server, bad_bodies, killed_clients, removed_adapter, slow_bodies, started
from serving.tiny_service import KEY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(client, service):
    """The service of the other tests, behind uvicorn."""
    uvicorn = pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    listening = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(client.app, lifespan="off", log_config=None, access_log=False))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    yield Server(listening.getsockname()[1], KEY)
    running.should_exit = True
    thread.join(60)


def test_killed_clients_leave_nothing_behind(server, service):
    expected = server.scores()
    killed_clients(server, 4)
    assert server.scores() == expected
    for _ in range(1000):  # the thread forgets requests when it looks at the queue again
        if not service.scoring.waiting.tokens:
            break
        time.sleep(0.01)
    assert service.scoring.waiting.tokens == 0


def test_others_are_answered_beside_slow_bodies(server, service, monkeypatch):
    monkeypatch.setitem(service.spec.limits.__dict__, "body_timeout", 0.5)
    slow_bodies(server, 4, 0.5)


def test_bad_bodies(server):
    statuses = bad_bodies(server, 300, seed=1)
    assert statuses.keys() >= {200, 400, 422} and statuses.total() == 300


def test_the_folder_of_an_adapter_is_removed(server, service):
    try:
        removed_adapter(server, service.spec.models_root)
    finally:
        service.models.unload("removed")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of another process")
def test_a_document_that_has_no_room_fails_alone(tmp_path):
    pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    make_wide_model(tmp_path)
    with started(tmp_path, 60.0, tmp_path, TOKENS, GIVES_BACK) as (server, process):
        statuses = no_room(server, process.pid, 2)
        assert statuses.total() == 6 and process.poll() is None
