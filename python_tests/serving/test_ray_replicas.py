"""``qpeft serve --engine ray`` on a local Ray: scores, which replica is asked, and one that is killed."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from serving.tiny_service import DEMO, KEY

from qpeft_ext.cli import main

MODEL = ("--model", f"code={DEMO / 'adapter'}", "--base-model", str(DEMO / "base_lm"), "--device", "cpu")
LISTS = [[f"def item_{i}_{j}(values): return values[{j}]" for j in range(3)] for i in range(8)]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--engine", "local", "--replicas", "2"], "--replicas is for --engine ray"),
    (["--engine", "ray", "--replicas", "0"], "--replicas must be at least 1"),
    (["--engine", "kubernetes"], "--engine must be local or ray"),
    (["--engine", "ray", "--models-root", "."], "--models-root loads models in one process"),
])  # fmt: skip
def test_wrong_options_are_one_line(capsys, arguments, message):
    assert main(["serve", *MODEL, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_ray_is_asked_for_where_it_is_missing(capsys, monkeypatch):
    pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["serve", *MODEL, "--port", "0", "--engine", "ray"]) == 2
    assert "--engine ray needs Ray: pip install 'qpeft_ext[ray]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server of two replicas, and a function that sends it requests."""
    pytest.importorskip("ray.serve", reason="ray is not installed: pip install 'qpeft_ext[ray]'")
    pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    log = tmp_path_factory.mktemp("ray") / "log"
    command = [sys.executable, "-m", "qpeft_ext.cli", "serve", *MODEL, "--port", "0", "--deterministic",
               "--api-key", KEY, "--engine", "ray", "--replicas", "2"]  # fmt: skip
    # Ray's own default lets workers starve beside other work
    environment = {**os.environ, "RAY_worker_niceness": "0"}
    with (
        open(log, "w") as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=file, text=True, env=environment, start_new_session=True
        ) as process,
    ):
        try:
            found = re.search(r"http://127.0.0.1:\d+", process.stdout.readline())
            assert found, log.read_text()

            def send(path, body=None, key=KEY):
                data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
                request = urllib.request.Request(found[0] + path, data, {"authorization": f"Bearer {key}"})
                try:
                    with urllib.request.urlopen(request, timeout=600) as answer:
                        return answer.status, json.load(answer) if path != "/metrics" else answer.read().decode()
                except urllib.error.HTTPError as error:
                    return error.code, json.loads(error.read())

            until_ready(process, send, log)
            yield process, send, log
        finally:
            process.terminate()
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def until_ready(process, send, log):
    """Wait until both replicas score."""
    while [each["status"] for each in send("/ready")[1]["replicas"]] != ["ready", "ready"]:
        assert process.poll() is None, log.read_text()
        time.sleep(0.5)


def ask(send, documents, query="the first item"):
    status, body = send("/v1/rerank", {"query": query, "documents": documents, "raw_scores": True})
    assert status == 200, body
    return body


def replica_process(session):
    """Return the process of the first replica."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            mine = int((process / "stat").read_text().rpartition(")")[2].split()[3]) == session
            if mine and (process / "cmdline").read_bytes().startswith(b"ray::ServeReplica:qpeft-0"):
                return int(process.name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    raise AssertionError("the first replica has no process")


@pytest.mark.slow
def test_scores_are_those_of_one_server_and_repeated_documents_are_cached(server, reranker):
    _, send, _ = server
    first = [ask(send, documents) for documents in LISTS]
    for documents, body in zip(LISTS, first, strict=True):
        found = {result["index"]: result["relevance_score"] for result in body["results"]}
        pairs = [("the first item", document) for document in documents]
        assert [found[i] for i in range(3)] == reranker.score(pairs).tolist()
    again = [ask(send, documents[::-1], "another query") for documents in LISTS]  # after requests for others
    assert all(body["meta"]["cached_tokens"] == 0 for body in first)
    assert all(body["meta"]["cached_tokens"] > 0 for body in again)
    page = send("/metrics")[1]
    scored = [float(re.search(rf'qpeft_pairs_total{{replica="{i}"}} (\S+)', page)[1]) for i in range(2)]
    assert min(scored) > 6 and sum(scored) >= 48


@pytest.mark.slow
def test_bad_requests_have_the_errors_of_one_server(server, client):
    _, send, _ = server
    for body in (b"[", b"{}", b'{"query": " ", "documents": ["a"]}', b'{"query": "a", "documents": [{"id": "d"}]}'):
        alone = client.post("/v1/rerank", content=body)
        assert send("/v1/rerank", body) == (alone.status_code, alone.json())
    assert send("/v1/rerank", {"query": "a", "documents": ["b"]}, key="wrong")[0] == 401
    assert send("/v1/models", {"name": "a", "adapter": "b"})[0] == 403
    assert send("/nowhere")[0] == 404


@pytest.mark.slow
def test_a_killed_replica_is_replaced_and_requests_are_answered_meanwhile(server):
    process, send, log = server
    expected = [ask(send, documents)["results"] for documents in LISTS]
    many = [f"def value_{j}(values): return values[{j}] + {j}" for j in range(300)]
    answers = []
    thread = threading.Thread(target=lambda: answers.extend(ask(send, many[i::4]) for i in range(4)))
    thread.start()
    os.kill(replica_process(process.pid), signal.SIGKILL)
    assert [ask(send, documents)["results"] for documents in LISTS] == expected
    thread.join()
    assert sorted(len(body["results"]) for body in answers) == [75] * 4
    until_ready(process, send, log)
    assert [ask(send, documents)["results"] for documents in LISTS] == expected


@pytest.mark.slow
def test_sigterm_ends_it(server):
    process, send, log = server
    ask(send, LISTS[0])
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 0, log.read_text()
    assert all("rror" not in line for line in log.read_text().splitlines() if line.startswith("{"))
