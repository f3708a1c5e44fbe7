"""Requests for `bench_serve.py`: texts, clients that send them, and servers in processes of their own."""

from __future__ import annotations

import contextlib
import http.client
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
PATIENCE = 3600  # seconds: a slow machine must show as a long time, not as a request without an answer


@dataclass(frozen=True)
class Request:
    """One request: a query and its documents."""

    query: str
    documents: list[str]

    def body(self) -> bytes:
        return json.dumps({"query": self.query, "documents": self.documents, "raw_scores": True}).encode()


def chunks(count: int, characters: int = 450) -> list[str]:
    """Return parts of the source of Python's standard library, all different."""
    folder = Path(inspect.getfile(json)).parents[1]
    found: dict[str, None] = {}
    for path in sorted(folder.glob("[a-z]*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        for start in range(0, len(text) - characters, characters):
            found[text[start : start + characters]] = None
            if len(found) == count:
                return list(found)
    raise ValueError(f"the standard library has {len(found)} parts of {characters} characters, {count} are wanted")


def waves(clients: int, documents: int, sharing: int, count: int, seed: int = 0) -> list[list[Request]]:
    """Return waves of requests; each document is in ``sharing`` of the requests of its wave, and in no other wave."""
    random = np.random.default_rng(seed)
    distinct = clients * documents // sharing
    texts = chunks(distinct * count)
    made = []
    for wave in range(count):
        own = texts[wave * distinct : (wave + 1) * distinct]
        places = np.concatenate([random.permutation(distinct) for _ in range(sharing)]).reshape(clients, documents)
        made.append([Request(query_of(own[row[0]], wave, i), [own[j] for j in row]) for i, row in enumerate(places)])
    return made


def query_of(text: str, wave: int, client: int) -> str:
    """Return a query about a text: a few of its words, and a number that makes it unique."""
    words = [word for word in text.split() if word.isidentifier()][:8]
    return f"{' '.join(words)} {wave} {client}"


# -- clients -----------------------------------------------------------------------------------------------------------


def send(port: int, request: Request, timeout: float = PATIENCE) -> tuple[float, dict[int, float]]:
    """Send a request. Returns: seconds, and the score of each document by its place."""
    started = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/rerank", request.body(), {"content-type": "application/json"})
        answer = connection.getresponse()
        body = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"status {answer.status}: {body[:200]!r}")
    results = json.loads(body)["results"]
    return time.perf_counter() - started, {r["index"]: r["relevance_score"] for r in results}


def send_all(port: int, requests: Sequence[Request], clients: int) -> tuple[float, list[float], list[dict[int, float]]]:
    """Send requests by so many clients.

    Returns: seconds in all, those of each request, its scores.
    Raises: RuntimeError that says how many were not answered, and why the first was not.
    """
    results: list[tuple[float, dict[int, float]] | None] = [None] * len(requests)
    places = iter(range(len(requests)))
    lock = threading.Lock()
    failures: list[Exception] = []

    def work() -> None:
        while True:
            with lock:
                place = next(places, None)
            if place is None:
                return
            try:
                results[place] = send(port, requests[place])
            except (OSError, RuntimeError, http.client.HTTPException) as error:
                failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(min(clients, len(requests)))]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    if failures:
        raise RuntimeError(f"{len(failures)} of {len(requests)} requests were not answered; the first: {failures[0]}")
    done = [result for result in results if result is not None]
    return seconds, [each for each, _ in done], [scores for _, scores in done]


# -- servers -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def server(command: Sequence[str], port: int, threads: int) -> Iterator[int]:
    """Run a server as long as this is entered. Yields: the group of its processes, when it answers."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
                               start_new_session=True)  # fmt: skip
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} ended with code {process.returncode}")
            with contextlib.suppress(OSError, RuntimeError, http.client.HTTPException):
                send(port, Request("is it ready", ["a document"]), timeout=20)
                break
            time.sleep(1)
        yield process.pid
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # LitServe's workers outlive it


@contextlib.contextmanager
def stopped(groups: Sequence[int]) -> Iterator[None]:
    """Stop these groups of processes as long as this is entered: a LitServe that waits takes a tenth of a core."""
    for group in groups:
        os.killpg(group, signal.SIGSTOP)
    try:
        yield
    finally:
        for group in groups:
            os.killpg(group, signal.SIGCONT)


def free_port() -> int:
    """Return a port that nobody uses now."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        return made.getsockname()[1]


def ours(port: int, model: Sequence[str], *options: str) -> list[str]:
    """Return the command that starts our server."""
    return [sys.executable, "-m", "qpeft_ext.cli", "serve", *model, "--port", str(port), "--device", "cpu",
            "--dtype", "float32", "--log-level", "error", "--request-timeout", str(PATIENCE), *options]  # fmt: skip


def litserve(port: int, adapter: str, base_model: str, cached: bool) -> list[str]:
    """Return the command that starts LitServe around the same LM."""
    script = str(HERE / "litserve_server.py")
    return [sys.executable, script, adapter, base_model, str(port), str(PATIENCE), *(["--cached"] if cached else [])]
