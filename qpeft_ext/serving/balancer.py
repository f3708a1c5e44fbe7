"""`Balancer`: forwards requests to replicas of the server, those for the same documents to the same one."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import pydantic_core
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from .auth import Keys
from .bodies import read_body
from .errors import COHERE, JINA, OPENAI, ErrorShape, RequestError, unexpected
from .handling import client_gone, error_response, json_response
from .metrics import one_page
from .service import running_pool
from .settings import ServeSpec

_DOCUMENTS = ("documents", "texts", "items", "text_2", "data_2")  # the fields of all APIs that may hold them
_NEXT = (429, 503)  # statuses for which another replica is asked
_SHAPES: dict[str, ErrorShape] = {"/v2/rerank": COHERE, "/v1/rerank": JINA, "/rerank": JINA}
_ALIVE = ("/health", "/ping")  # Ray replaces replicas that are not
_ALL = ("/ready", "/metrics")  # are asked of every replica


@dataclass(frozen=True)
class Forwarded:
    """A request as a replica gets it; strings and bytes only."""

    method: str
    path: str
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes = b""


@dataclass(frozen=True)
class Answer:
    """The answer of a replica.

    Attributes:
        status, headers, body: of the response.
        route: the pattern of the path, for the log.
        counts: further entries of the log's line.
    """

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    route: str
    counts: dict[str, Any]


class Replica(Protocol):
    """A server of its own, in another process."""

    async def ask(self, request: Forwarded) -> Answer:
        """Answer a request. Raises: ConnectionError if the process is gone."""


def document_key(body: bytes) -> bytes:
    """Return the smallest hash of a request's documents, b"" if it has none that can be read.

    Two lists have the same smallest hash as often as they share documents (their Jaccard similarity).
    """
    try:
        parsed = pydantic_core.from_json(body)
    except ValueError:
        return b""
    if not isinstance(parsed, dict):
        return b""
    given: Any = next((parsed[name] for name in _DOCUMENTS if parsed.get(name)), [])
    documents = given if isinstance(given, list) else [given]
    return min(map(_digest, map(_identity, documents)), default=b"")


def _identity(document: Any) -> str:
    if isinstance(document, dict) and set(document) == {"text"}:
        document = document["text"]
    return document if isinstance(document, str) else json.dumps(document, sort_keys=True)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def preferred(key: bytes, replicas: int) -> list[int]:
    """Order replicas for a key by rendezvous hashing: without one of them, only its keys move."""
    return sorted(range(replicas), key=lambda i: hashlib.sha256(key + i.to_bytes(4, "big")).digest())


class Balancer:
    """An ASGI app in front of replicas. It limits bodies as they do; all else is theirs.

    Args:
        spec: what each replica serves.
        replicas: in an order that stays, also when one is replaced.
    """

    def __init__(self, spec: ServeSpec, replicas: Sequence[Replica]) -> None:
        self._limits, self._keys, self._replicas = spec.limits, Keys(spec.api_keys), replicas
        self._pool = running_pool(2, "qpeft-balance")
        self._in_flight = 0

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        request = Request(scope, receive)
        self._in_flight += 1
        try:
            response = await self._respond(request)
        except Exception as error:
            failure = error if isinstance(error, RequestError) else unexpected(error)
            response = error_response(failure, _SHAPES.get(request.url.path, OPENAI))
        finally:
            self._in_flight -= 1
        await response(scope, receive, send)

    async def _respond(self, request: Request) -> Response:
        path = request.url.path
        forwarded = Forwarded(request.method, path, tuple(request.headers.raw))
        if path in _ALIVE:
            _log(request, path)
            return json_response({"status": "ok"})
        if path in _ALL:
            _log(request, path)
            return await self._of_all(forwarded)
        if path.startswith("/v1/models") and request.method != "GET":
            raise RequestError(
                "forbidden", "with --engine ray the models are those of the start; start again for others"
            )
        if request.method == "POST" and self._keys.accept(request.headers.get("authorization")):
            most = self._limits.max_requests * len(self._replicas)
            if self._in_flight > most:
                raise RequestError("overloaded", f"{most} requests are being answered; try again in 1 s", retry_after=1)
            body = await read_body(request, self._limits)
            forwarded = Forwarded(request.method, path, forwarded.headers, body)
        key = await asyncio.get_running_loop().run_in_executor(self._pool, document_key, forwarded.body)
        asked = asyncio.ensure_future(self._first_that_can(forwarded, preferred(key, len(self._replicas))))
        gone = asyncio.ensure_future(client_gone(request))
        try:
            await asyncio.wait({asked, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                raise RequestError("cancelled", "the client has gone")
            answer = await asked
        finally:
            asked.cancel()
            gone.cancel()
        _log(request, answer.route, answer.counts)
        response = Response(answer.body, answer.status)
        response.raw_headers = list(answer.headers)
        return response

    async def _first_that_can(self, request: Forwarded, order: Iterable[int]) -> Answer:
        """Ask one replica after the other until one can answer."""
        answer = None
        for i in order:
            try:
                answer = await self._replicas[i].ask(request)
            except ConnectionError:
                continue
            if answer.status not in _NEXT:
                break
        if answer is None:
            raise RequestError("not_ready", "no replica runs; try again in a few seconds", retry_after=5)
        return answer

    async def _of_all(self, request: Forwarded) -> Response:
        """Answer for all replicas together; one that is gone is being replaced."""
        found = await asyncio.gather(*(r.ask(request) for r in self._replicas), return_exceptions=True)
        answers = {str(i): answer for i, answer in enumerate(found) if isinstance(answer, Answer)}
        if request.path == "/metrics":
            page = one_page({i: answer.body.decode() for i, answer in answers.items() if answer.status == 200})
            return Response(page, media_type=CONTENT_TYPE_LATEST)
        gone = {"status": "not ready", "reason": "a new process is being started"}
        states = [json.loads(answer.body) if isinstance(answer, Answer) else gone for answer in found]
        ready = any(state["status"] == "ready" for state in states)
        return json_response({"status": "ready" if ready else "not ready", "replicas": states}, 200 if ready else 503)


def _log(request: Request, route: str, counts: dict[str, Any] | None = None) -> None:
    request.scope["route"] = SimpleNamespace(path=route)
    request.scope.setdefault("state", {})["qpeft"] = counts or {}


def with_lifespan(app: Any, start: Callable[[], object], stop: Callable[[], object]) -> Any:
    """Let an ASGI app do something when the server starts, and when it ends."""

    async def lifespan(scope: dict, receive: Any, send: Any) -> None:
        loop = asyncio.get_running_loop()
        await receive()
        start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await loop.run_in_executor(None, stop)
        await send({"type": "lifespan.shutdown.complete"})

    async def either(scope: dict, receive: Any, send: Any) -> None:
        await (lifespan if scope["type"] == "lifespan" else app)(scope, receive, send)

    return either
