"""``qpeft serve`` as a command: options, a process that clients leave, and its end by SIGTERM."""

import http.client
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from serving.tiny_service import DEMO

from qpeft_ext.cli import main
from qpeft_ext.cli.serve import ServeOptions, _models, _spec

pytestmark = pytest.mark.slow

MODEL = ("--model", f"code={DEMO / 'adapter'}", "--base-model", str(DEMO / "base_lm"))


@pytest.fixture
def process(tmp_path):
    """A server in a process of its own, and its address."""
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(package, reason="the extra serve is not installed")
    command = [sys.executable, "-m", "qpeft_ext.cli", "serve", *MODEL, "--port", "0", "--device", "cpu"]
    with (
        open(tmp_path / "log", "w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            line = process.stdout.readline()
            yield process, re.search(r"http://127.0.0.1:(\d+)", line)[0], tmp_path / "log"
        finally:
            process.kill()


def post(address, body):
    request = urllib.request.Request(f"{address}/v1/rerank", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def leave_at_once(address, body):
    """Send a request and reset the connection, as the system does for a client that is killed."""
    data = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=60) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(b"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data) + data)


def test_a_new_process_survives_clients_that_leave_and_drains_at_sigterm(process):
    server, address, log = process
    while True:
        try:
            with urllib.request.urlopen(f"{address}/ready", timeout=300):
                break
        except OSError:  # the model is being loaded
            assert server.poll() is None, log.read_text()
    idle = http.client.HTTPConnection("127.0.0.1", int(address.rpartition(":")[2]), timeout=60)
    for seconds in (0, 7, 0):  # uvicorn by itself closes a connection after 5 s, which a proxy would use again
        time.sleep(seconds)
        idle.request("GET", "/health")
        assert idle.getresponse().read() == b'{"status":"ok"}'
        idle.auto_open = 0  # so that a closed connection is an error
    documents = [f"def item_{i}(values): return values[{i}]" for i in range(300)]
    for i in range(20):
        leave_at_once(address, {"query": f"item {i}", "documents": documents})
    whole = {"query": "the first item", "documents": documents}
    answers = []
    thread = threading.Thread(target=lambda: answers.append(post(address, whole)))
    thread.start()
    post(address, {"query": "an item", "documents": documents[:2]})  # so the one before has been received
    server.send_signal(signal.SIGTERM)
    thread.join(300)
    assert len(answers[0]["results"]) == 300
    assert server.wait(300) == 0
    with pytest.raises(OSError):
        post(address, whole)
    lines = [json.loads(line) for line in log.read_text().splitlines()]  # nothing but the access log: no error
    assert {line["route"] for line in lines} <= {"/health", "/ready", "/v1/rerank"}


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_while_the_model_is_being_loaded_ends_the_process(process, sent, code):
    server, _, log = process
    server.send_signal(sent)
    assert server.wait(300) == code, log.read_text()
    assert "terminate" not in log.read_text()


def test_a_model_that_cannot_be_loaded_ends_the_command_with_one_line(tmp_path, capsys):
    pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    assert main(["serve", "--model", str(tmp_path), "--base-model", str(DEMO / "base_lm"), "--port", "0"]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("qpeft serve: error: ") and "adapter_config.json" in err


def test_an_address_in_use_is_one_line(capsys):
    pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", *MODEL, "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "expected --model ADAPTER, or --base-model LM"),
    (["--model", "a", "--model", "b/a"], "two models have the name 'a'"),
    (["--model", "=a"], "NAME=ADAPTER"),
    (["--model", "a", "--host", ""], "--host is empty"),
    (["--model", "a", "--max-documents", "0"], "--max-documents must be at least 1"),
    (["--model", "a", "--disk-bytes", "5"], "belong together"),
    (["--model", "a", "--log-level", "loud"], "--log-level"),
    (["--model", "a", "--models-root", "nowhere"], "--models-root must be a folder"),
    (["--model", "a", "--request-timeout", "0"], "--request-timeout must be positive"),
    (["--model", "a", "--body-timeout", "nan"], "--body-timeout must be positive"),
    (["--model", "a", "--drain-seconds", "-1"], "--drain-seconds must be at least 0, got -1"),
])  # fmt: skip
def test_wrong_options_are_one_line(capsys, arguments, message):
    assert main(["serve", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_names_of_models(tmp_path, monkeypatch):
    odd = tmp_path / "a=b"
    odd.mkdir()
    assert _models(["x=some/adapter", "owner/name", str(odd)], None) == {
        "x": "some/adapter", "name": "owner/name", "a=b": str(odd),
    }  # fmt: skip
    assert _models(None, "owner/lm") == {"lm": None}
    monkeypatch.setenv("QPEFT_API_KEY", "from the environment")
    assert _spec(ServeOptions(model=["a"])).api_keys == ("from the environment",)
    assert _spec(ServeOptions(model=["a"], api_key=["given"])).api_keys == ("given",)
