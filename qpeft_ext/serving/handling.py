"""One request for scores, from its first byte to the answer."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from .apis import Api
from .bodies import parse_object, read_body, validate
from .errors import ErrorShape, RequestError, unexpected
from .prepare import Prepared
from .ranked import rank
from .service import Service

Result = TypeVar("Result")


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Make a response; a number that JSON does not have is an error."""
    content = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")
    return Response(content, status, headers, media_type="application/json")


def error_response(error: RequestError, shape: ErrorShape) -> Response:
    """Make the response of an error."""
    status, body = shape.render(error)
    return json_response(body, status, error.headers)


class Handler:
    """Answers requests for scores.

    Args:
        service: does the work.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self._in_flight = 0

    async def __call__(self, request: Request, default: Api, choose: Callable[[dict[str, Any]], Api]) -> Response:
        """Answer a request.

        Args:
            default: the API that errors follow until the body is known.
            choose: gives the API of a body.
        """
        api = default
        limit = self.service.spec.limits.max_requests
        self._in_flight += 1
        try:
            self.service.keys.check(request.headers.get("authorization"))
            self.service.expect_loaded()
            if self._in_flight > limit:
                raise RequestError(
                    "overloaded", f"{limit} requests are being answered; try again in 1 s", retry_after=1
                )
            body = await read_body(request, self.service.spec.limits)
            parsed = await self._in_pool(parse_object, body)
            api = choose(parsed)
            return await self._answer(request, api, parsed)
        except RequestError as error:
            self.service.metrics.failed(error.kind)
            return error_response(error, api.errors)
        except Exception as error:
            failure = unexpected(error)
            self.service.metrics.failed(failure.kind)
            return error_response(failure, api.errors)
        finally:
            self._in_flight -= 1

    async def _answer(self, request: Request, api: Api, parsed: dict[str, Any]) -> Response:
        started, given_up = time.monotonic(), threading.Event()
        gone: asyncio.Future[None] = asyncio.ensure_future(client_gone(request))

        def prepare() -> Prepared:
            return self.service.submit(validate(api.schema, parsed).ask(), given_up)

        try:
            prepared = await self._unless(gone, self.service.pool.submit(prepare), started)
            await self._unless(gone, prepared.job.future, started)
            if prepared.ask.spans is None:
                return await self._in_pool(self._respond, request, api, prepared, started)
            # spans take passes of the LM: in a thread of their own they hold up nobody's body, tokens or answer
            found = self.service.spans_pool.submit(self._respond, request, api, prepared, started)
            return await self._unless(gone, found, started)
        finally:
            given_up.set()
            gone.cancel()

    async def _unless(self, gone: asyncio.Future[None], future: Future[Result], started: float) -> Result:
        """Wait for a part of the work; drop it if the client goes away or the request takes too long."""
        wanted: asyncio.Future[Result] = asyncio.wrap_future(future)
        limit = self.service.spec.limits.request_timeout
        try:
            left = max(0.0, started + limit - time.monotonic())
            either: set[asyncio.Future[Any]] = {wanted, gone}
            done, _ = await asyncio.wait(either, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if wanted in done:
                return await wanted
            if done:
                raise RequestError("cancelled", "the client has gone")
            raise RequestError("timeout", f"no answer within {limit:g} s; send fewer documents a request")
        finally:
            wanted.cancel()  # which the queue looks at; nothing if it is done

    def _respond(self, request: Request, api: Api, prepared: Prepared, started: float) -> Response:
        job = prepared.job
        ranked = rank(prepared)
        queued = max(0.0, (job.started or job.arrived) - job.arrived)
        self.service.metrics.scored(
            len(prepared.documents), ranked.input_tokens, prepared.seconds, queued, job.inference_seconds
        )
        seconds = {
            "total": time.monotonic() - started,
            "tokenization": prepared.seconds,
            "queue": queued,
            "inference": job.inference_seconds,
        }
        headers = {f"x-{name}-time": f"{1000 * value:.1f}" for name, value in seconds.items()}  # ms
        headers |= {"x-compute-tokens": str(ranked.input_tokens), "x-cached-tokens": str(ranked.cached_tokens)}
        request.scope["state"]["qpeft"] = {
            "id": ranked.request_id,
            "documents": len(prepared.documents),
            "tokens": ranked.input_tokens,
            "cached_tokens": ranked.cached_tokens,
            "queue_ms": round(1000 * queued, 1),
            "inference_ms": round(1000 * job.inference_seconds, 1),
        }
        return json_response(api.respond(ranked), 200, headers | {"x-request-id": ranked.request_id})

    async def _in_pool(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.service.pool, work, *arguments)


async def client_gone(request: Request) -> None:
    """Wait until the client has gone; its body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
