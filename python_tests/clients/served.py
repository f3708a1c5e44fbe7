"""A running `qpeft serve`, in a process of its own, and what it answers to a plain request."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import qpeft_ext

DEMO = Path(qpeft_ext.__file__).parent / "demo"
KEY = "the-key"


@dataclass(frozen=True)
class Server:
    """The server, and what it answers for `DOCUMENTS`, read without a client's help.

    Attributes:
        url: where it listens.
        order: places of the documents, best first.
        scores: the relevance of each document, in their order.
    """

    url: str
    order: list[int]
    scores: list[float]


QUERY = "sort the items of a list"
DOCUMENTS = [
    "Delete a file or an empty folder.",
    "Return a new list with the items of the iterable in ascending order.",
    "Open a file and return a file object.",
    "Return the sum of the items.",
]


@contextmanager
def serving() -> Iterator[Server]:
    """Start the packaged adapter as the model "code", with a key; it ends with the block."""
    model = ["--model", f"code={DEMO / 'adapter'}", "--base-model", str(DEMO / "base_lm")]
    command = [sys.executable, "-m", "qpeft_ext.cli", "serve", *model, "--port", "0", "--api-key", KEY]
    process = subprocess.Popen(
        [*command, "--deterministic"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    said: list[str] = []
    try:
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", said[-1] if said else "")):
            line = process.stdout.readline()
            assert line, "".join(said)
            said.append(line)
        threading.Thread(target=process.stdout.read, daemon=True).start()  # or its log would fill the pipe
        _wait(f"{found[0]}/ready", process)
        rows = _post(found[0])["results"]
        scores = [row["relevance_score"] for row in sorted(rows, key=lambda row: row["index"])]
        order = [row["index"] for row in rows]
        assert order[0] == 1 and len(set(scores)) == len(DOCUMENTS)
        yield Server(found[0], order, scores)
    finally:
        process.terminate()
        process.wait(60)


def _wait(url: str, process: subprocess.Popen) -> None:
    """Wait until the model is loaded; a machine that is busy may take minutes."""
    for _ in range(1200):
        assert process.poll() is None, f"qpeft serve ended with exit code {process.returncode}"
        try:
            with urllib.request.urlopen(url, timeout=60):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.25)
    raise AssertionError("qpeft serve did not become ready")


def _post(url: str) -> dict:
    body = json.dumps({"query": QUERY, "documents": DOCUMENTS}).encode()
    request = urllib.request.Request(f"{url}/v1/rerank", body, {"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)
