"""Faults that a running `qpeft serve` must survive: clients that are killed, slow and bad bodies, no memory, no disk.

    python python_tests/fuzz/serve_faults.py --kills 100 --slow 50 --bodies 10000 --requests 10000

After every fault the same question is asked; its scores must be those of the beginning, but for rounding. Resident
memory may grow by 5 % after the first 500 requests of new documents. ``make fuzz-serve`` runs this, too.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.mutations import damaged

import qpeft_ext

DEMO = Path(qpeft_ext.__file__).parent / "demo"
ROUTES = ("/v2/rerank", "/v1/rerank", "/rerank", "/v1/score", "/score", "/v1/models")
ASKED = {"query": "sort a list", "documents": ["sorted(items)", "os.remove(path)"], "raw_scores": True}
WARM = 500  # requests of new documents, after which caches and allocators have their size
GROWTH = 0.05
ROUNDING = 1e-3  # nats of a whole query, float32
# sends what it gets on stdin, says so, and waits for its end
CLIENT = (
    "import socket, sys; s = socket.create_connection(('127.0.0.1', int(sys.argv[1])));"
    "s.sendall(sys.stdin.buffer.read()); print('sent', flush=True); s.recv(1 << 20); s.recv(1 << 20)"
)


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        port: where it listens on 127.0.0.1.
        key: that requests must carry.
        patience: seconds for which an answer may take; a longer time is a hang.
    """

    port: int
    key: str
    patience: float = 60.0

    def post(self, body: bytes, route: str = "/v1/rerank") -> tuple[int, bytes]:
        """Send a body. Returns: the status and the body of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.patience)
        with contextlib.closing(connection):
            connection.request("POST", route, body, {"authorization": f"Bearer {self.key}"})
            answer = connection.getresponse()
            return answer.status, answer.read()

    def head(self, length: int, route: str = "/v1/rerank") -> bytes:
        """Return the first lines of a request whose body has so many bytes."""
        lines = (f"POST {route} HTTP/1.1", "host: x", f"authorization: Bearer {self.key}", f"content-length: {length}")
        return "\r\n".join((*lines, "", "")).encode()

    def scores(self, asked: dict = ASKED) -> list[float]:
        """Ask a question. Returns: the score of each document."""
        status, body = self.post(json.dumps(asked).encode())
        if status != 200:
            raise AssertionError(f"a plain request has status {status}: {body[:200]!r}")
        return scores_in(body)

    def ready(self) -> int:
        """Return the status of `/ready`."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.patience)
        with contextlib.closing(connection):
            connection.request("GET", "/ready")
            return connection.getresponse().status


def scores_in(answer: bytes) -> list[float]:
    """Return the score of each document from the body of an answer."""
    return [r["relevance_score"] for r in sorted(json.loads(answer)["results"], key=lambda r: r["index"])]


def same(found: list[float], expected: list[float]) -> bool:
    """Tell whether scores are equal but for rounding, which depends on what is scored with them."""
    return len(found) == len(expected) and all(abs(a - b) < ROUNDING for a, b in zip(found, expected, strict=True))


def long_request(number: int, documents: int = 40) -> bytes:
    """Return a body whose documents nobody has asked for before."""
    texts = [f"def item_{number}_{i}(values): return values[{i}] + {number}" for i in range(documents)]
    return json.dumps({"query": f"item {number}", "documents": texts}).encode()


def killed_clients(server: Server, count: int) -> None:
    """Kill clients by SIGKILL: one half in the middle of their body, the other while they wait for the answer."""
    for i in range(count):
        body = long_request(i)
        sent = server.head(len(body)) + (body if i % 2 else body[: len(body) // 2])
        with subprocess.Popen(
            [sys.executable, "-S", "-c", CLIENT, str(server.port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as client:
            assert client.stdin is not None and client.stdout is not None
            client.stdin.write(sent)
            client.stdin.close()
            assert client.stdout.readline() == b"sent\n"
            client.kill()


def slow_bodies(server: Server, count: int, seconds: float) -> None:
    """Hold requests whose bodies do not come; others are answered meanwhile, and these get 408.

    Args:
        seconds: for which the server waits for a body.
    """
    expected, waits = server.scores(), []
    with contextlib.ExitStack() as stack:
        started = time.monotonic()
        for _ in range(count):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=60))
            connection.sendall(server.head(1000) + b'{"query": "')
            waits.append(connection)
        while time.monotonic() - started < seconds / 2:
            for connection in waits:
                connection.sendall(b"a")
            assert same(server.scores(), expected), "wrong scores beside slow bodies"
            time.sleep(seconds / 10)
        for connection in waits:
            status = connection.recv(1 << 16).split(b" ", 2)[1]
            assert status == b"408", f"a body that does not come has status {status!r}"


def bad_bodies(server: Server, count: int, seed: int) -> Counter[int]:
    """Send damaged bodies to every route. Returns: how often each status came."""
    draw, statuses = random.Random(seed), Counter[int]()
    whole = [
        json.dumps({"query": "a", "documents": ["b", {"text": "c", "title": "d"}], "top_n": 1, "threshold": 0.1}),
        json.dumps({"query": "a", "texts": ["b", "c"], "truncate": True, "return_text": True}),
        json.dumps({"text_1": ["a", "b"], "text_2": ["c", "d"], "model": "code", "raw_scores": False}),
        json.dumps({"name": "code", "adapter": "copy"}),
    ]
    expected = server.scores()
    while statuses.total() < count:
        body = damaged(draw.choice(whole).encode(), draw, "body.json")
        if isinstance(body, str):
            continue
        route = draw.choice(ROUTES)
        status, answer = server.post(body, route)
        statuses[status] += 1
        assert status < 500, f"{route} has status {status} for {body[:300]!r}: {answer[:300]!r}"
        if statuses.total() % 500 == 0:
            assert same(server.scores(), expected), f"wrong scores after {statuses.total()} bad bodies"
    return statuses


def removed_adapter(server: Server, root: Path, adapter: Path = DEMO / "adapter") -> None:
    """Remove the folder of a model that was loaded; it is in memory and still answers, and cannot be loaded again."""
    folder = root / "removed"
    shutil.copytree(adapter, folder)
    named = {"name": "removed", "adapter": folder.name}
    assert server.post(json.dumps(named).encode(), "/v1/models")[0] == 200
    shutil.rmtree(folder)
    assert same(server.scores(ASKED | {"model": "removed"}), server.scores())
    status, body = server.post(json.dumps(named | {"name": "again"}).encode(), "/v1/models")
    assert status == 400 and b"no folder" in body, (status, body)


# -- what needs a process of its own -----------------------------------------------------------------------------------


@contextlib.contextmanager
def limited(process: int, kind: int, most: int) -> Iterator[None]:
    """Let a process have so much of something while this is entered."""
    before = resource.prlimit(process, kind, (most, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.prlimit(process, kind, before)


def memory(process: int, name: str) -> int:
    """Return the bytes that the system counts for a process, by their name in its status."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def out_of_memory(server: Server, process: int, count: int) -> Counter[int]:
    """Leave the server a few MiB of address space, and ask for more. Returns: how often each status came."""
    expected, statuses = server.scores(), Counter[int]()
    for i in range(count):
        with limited(process, resource.RLIMIT_AS, memory(process, "VmSize") + (1 << 20 + i % 8)):
            words = " ".join(f"item_{i}_{j}" for j in range(40))
            body = json.dumps({"query": words, "documents": [f"{words} {j}" for j in range(200)], "raw_scores": True})
            status, answer = server.post(body.encode())
            statuses[status] += 1
            assert status in (200, 503), f"without memory a request has status {status}: {answer[:300]!r}"
        assert same(server.scores(), expected), "wrong scores after a lack of memory"
        if status == 200:
            assert same(server.scores(json.loads(body)), scores_in(answer)), "wrong scores in the lack of memory"
    return statuses


def full_disk(server: Server, process: int, count: int) -> None:
    """Keep the server from writing files: its cache on disk is of no use then, and scores are right."""
    bodies = [json.loads(long_request(10**6 + i, 10)) | {"raw_scores": True} for i in range(count)]
    with limited(process, resource.RLIMIT_FSIZE, 1):
        scores = [server.scores(body) for body in bodies]
    assert all(same(server.scores(body), before) for body, before in zip(bodies, scores, strict=True))


def grown(server: Server, process: int, count: int) -> float:
    """Ask about new documents. Returns: by how much resident memory grew, a share, after `WARM` of them."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=server.patience)
    key, first = {"authorization": f"Bearer {server.key}"}, 0
    for i in range(count):
        if i == min(WARM, count // 2):
            first = memory(process, "VmRSS")
        connection.request("POST", "/v1/rerank", long_request(2 * 10**6 + i, 2), key)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200
    return memory(process, "VmRSS") / first - 1


@contextlib.contextmanager
def started(
    folder: Path,
    body_timeout: float,
    model: Path = DEMO,
    document_tokens: int = 64,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[tuple[Server, subprocess.Popen[str]]]:
    """Start a server whose caches are small and lie below a folder.

    Args:
        folder: takes the caches, and models to be loaded.
        body_timeout, document_tokens: options of the server.
        model: folder with ``adapter`` and ``base_lm``.
        environment: variables besides those of this process.
    """
    (folder / "models").mkdir()
    command = [sys.executable, "-m", "qpeft_ext.cli", "serve", "--model", f"code={model / 'adapter'}",
               "--base-model", str(model / "base_lm"), "--port", "0", "--device", "cpu", "--dtype", "float32",
               "--api-key", "key", "--models-root", str(folder / "models"), "--log-level", "error",
               "--cache-bytes", str(4 << 20), "--disk-cache", str(folder / "cache"), "--disk-bytes", str(16 << 20),
               "--body-timeout", str(body_timeout), "--max-document-tokens", str(document_tokens)]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://127.0.0.1:(\d+)", process.stdout.readline())
            if found is None:
                raise SystemExit("the server did not start")
            server = Server(int(found[1]), "key")
            while server.post(json.dumps(ASKED).encode())[0] == 503:  # the model is being loaded
                if process.poll() is not None:
                    raise SystemExit(f"the server ended with code {process.returncode}")
                time.sleep(0.5)
            yield server, process
        finally:
            process.terminate()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="clients that are killed in the middle of a request")
    parser.add_argument("--slow", type=int, default=50, help="bodies that do not come")
    parser.add_argument("--bodies", type=int, default=10_000, help="bad bodies")
    parser.add_argument("--memory", type=int, default=40, help="requests without memory")
    parser.add_argument("--disk", type=int, default=40, help="requests with a full disk")
    parser.add_argument("--requests", type=int, default=10_000, help="requests between two looks at resident memory")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, started(Path(name), 5.0) as (server, process):
        expected = server.scores()
        steps = {
            "killed clients": lambda: killed_clients(server, given.kills),
            "slow bodies": lambda: slow_bodies(server, given.slow, 5.0),
            "bad bodies": lambda: bad_bodies(server, given.bodies, given.seed),
            "removed adapter": lambda: removed_adapter(server, Path(name) / "models"),
            "full disk": lambda: full_disk(server, process.pid, given.disk),
            "growth of resident memory": lambda: grown(server, process.pid, given.requests),
            "out of memory": lambda: out_of_memory(server, process.pid, given.memory),
        }
        for step, count in (("growth of resident memory", given.requests), ("out of memory", given.memory)):
            if not count:
                print(f"{step}: left out")
                del steps[step]
        for step, work in steps.items():
            began = time.monotonic()
            found = work()
            assert process.poll() is None, f"the server ended with code {process.returncode}"
            assert same(server.scores(), expected), f"wrong scores after: {step}"
            text = "" if found is None else f": {found:.1%}" if isinstance(found, float) else f": {dict(found)}"
            print(f"{step}{text}, {time.monotonic() - began:.0f} s", flush=True)
            assert not isinstance(found, float) or found <= GROWTH, f"resident memory grew by {found:.1%}"
    return 0


if __name__ == "__main__":
    sys.exit(main())
