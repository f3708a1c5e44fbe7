"""A small server of ``/v1/rerank``: the relevance of a document is the share of the query's words that it has."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

DOCUMENTS = ["the sea is near", "a boat at sea under the moon", "no word of it", "the moon"]
QUERY = "boat sea moon sun"
RELEVANCE = [0.25, 0.75, 0.0, 0.25]  # of DOCUMENTS for QUERY, counted by hand


class Stub:
    """What a server has been asked, and what it answers instead of a ranking.

    Attributes:
        url: where it listens.
        requests: (path, headers, body) of each request.
        answers: (status, headers, body) for the next requests, in this order; an empty list: it ranks.
    """

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[tuple[str, dict[str, str], dict]] = []
        self.answers: list[tuple[int, dict[str, str], bytes]] = []

    def rank(self, body: dict) -> dict:
        words = body["query"].split()
        texts = [document if isinstance(document, str) else document["text"] for document in body["documents"]]
        scores = [sum(word in text.split() for word in words) / len(words) for text in texts]
        order = sorted(range(len(scores)), key=lambda place: -scores[place])[: body.get("top_n")]
        return {"results": [{"index": place, "relevance_score": scores[place]} for place in order]}


@contextmanager
def serving() -> Iterator[Stub]:
    """Run a stub at a free port of this machine."""
    stub = Stub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            stub.requests.append((self.path, dict(self.headers), body))
            status, headers, answer = 200, {}, b""
            if stub.answers:
                status, headers, answer = stub.answers.pop(0)
            else:
                answer = json.dumps(stub.rank(body)).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(answer)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
