"""`RerankClient` and what a server says beside a ranking: a refusal before the body is read, and warnings."""

import json
import logging
import socket
import threading
from contextlib import contextmanager

import pytest
from stub_server import DOCUMENTS, QUERY

from qpeft_ext.integrations.client import RerankClient
from qpeft_ext.integrations.source import Source

LARGE = ["x" * (8 << 20)]  # more than the buffers of a connection hold
REFUSAL = json.dumps({"detail": "the body is larger than 1000 bytes; send it in parts"}).encode()


@contextmanager
def ending_early(answer: bytes):
    """A server that reads the headers, answers, and ends the connection with the body unread. Yields: its URL."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        thread.join()


def test_a_refusal_before_the_body_is_read_reaches_the_user():
    head = f"HTTP/1.1 413 Content Too Large\r\ncontent-length: {len(REFUSAL)}\r\nconnection: close\r\n\r\n".encode()
    with (
        ending_early(head + REFUSAL) as url,
        pytest.raises(RuntimeError, match="answered 413 .*: the body is larger than 1000 bytes; send it in parts"),
    ):
        RerankClient(url).rank(QUERY, LARGE)


def test_a_connection_that_ends_without_an_answer():
    with (
        ending_early(b"") as url,
        pytest.raises(ConnectionError, match=r"ended the connection without an answer .* are 8,388,\d\d\d bytes more"),
    ):
        RerankClient(url).rank(QUERY, LARGE)


def test_a_connection_that_ends_before_anything_is_sent():
    with (
        ending_early(b"") as url,  # in the handshake
        pytest.raises(ConnectionError, match="cannot be reached: .*; is the server running"),
    ):
        RerankClient(url.replace("http:", "https:")).rank(QUERY, LARGE)


def answer_with(meta) -> tuple[int, dict, bytes]:
    return 200, {}, json.dumps({"results": [{"index": 0, "relevance_score": 0.5}], "meta": meta}).encode()


@pytest.mark.parametrize("plugged_in", [False, True])
def test_a_query_that_the_server_cut_is_told(stub, caplog, plugged_in):
    ranker = Source(stub.url) if plugged_in else RerankClient(stub.url)
    stub.answers = [answer_with({"warnings": ["query was cut to 64 tokens", "documents[0] was cut to 9 of 20 tokens"]})]
    with caplog.at_level(logging.WARNING):
        ranker.rank(QUERY, DOCUMENTS[:1])
    assert [record.message for record in caplog.records] == [
        f"{stub.url}, for the query '{QUERY}': query was cut to 64 tokens"
    ]


@pytest.mark.parametrize(
    "meta", [None, [], {}, {"warnings": None}, {"warnings": [1]}, {"warnings": ["documents[0] was cut to 9 tokens"]}]
)
def test_other_answers_warn_of_nothing(stub, caplog, meta):
    stub.answers = [answer_with(meta)]
    with caplog.at_level(logging.WARNING):
        assert RerankClient(stub.url).rank(QUERY, DOCUMENTS[:1]) == [{"corpus_id": 0, "score": 0.5}]
    assert not caplog.records
