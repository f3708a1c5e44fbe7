"""The ASGI app: routes and their descriptions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from ..utils.environment import VERSION
from ..utils.inputs import short
from . import responses
from .access_log import AccessLog
from .apis import COHERE_API, JINA_API, SCORE_API, Api, rerank_api
from .bodies import parse_object, read_body, validate
from .errors import JINA, OPENAI, TEI, RequestError, unexpected
from .handling import Handler, error_response, json_response
from .openapi import body_of, describe_errors, with_bodies
from .paths import PlainPaths
from .schemas import CohereRequest, LoadRequest, RerankRequest, ScoreRequest, TeiRequest
from .service import Service


def create_app(service: Service, on_failure: Callable[[], object] = lambda: None) -> FastAPI:
    """Make the app of a service, which it starts and stops.

    Args:
        service: does the work.
        on_failure: called if the models cannot be loaded.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start(on_failure)
        yield
        await asyncio.get_running_loop().run_in_executor(None, service.stop)

    app = FastAPI(
        title="qpeft serve",
        version=VERSION,
        description="Reranks documents by how likely a frozen LM finds the query after each of them.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.add_middleware(AccessLog, answered=service.metrics.answered)
    app.add_middleware(PlainPaths)
    app.add_exception_handler(HTTPException, _no_route)
    _add_scoring(app, service)
    _add_state(app, service)
    _add_models(app, service)
    with_bodies(app, (CohereRequest, RerankRequest, TeiRequest, ScoreRequest, LoadRequest))
    return app


async def _no_route(request: Request, error: Exception) -> Response:
    """Answer for a path or a method that nothing is at, in the words of every API."""
    allowed = (getattr(error, "headers", None) or {}).get("Allow")
    if allowed is None:
        failure = RequestError("not_found", "there is no such route; /docs describes those that are here")
    else:
        failure = RequestError("not_allowed", f"this route takes {allowed} only, got {short(request.method)}")
    response = error_response(failure, JINA)
    response.headers.update({} if allowed is None else {"allow": allowed})
    return response


def _add_scoring(app: FastAPI, service: Service) -> None:
    handler = Handler(service)

    def add(
        path: str, api: Api, choose: Callable[[dict[str, Any]], Api], bodies: tuple, answer: Any, title: str
    ) -> None:
        async def endpoint(request: Request) -> Response:
            return await handler(request, api, choose)

        shapes = [api.errors, TEI] if TeiRequest in bodies else [api.errors]

        app.add_api_route(
            path,
            endpoint,
            methods=["POST"],
            summary=title,
            responses={200: {"model": answer}, **describe_errors(*shapes)},
            openapi_extra=body_of(*bodies),
            response_class=Response,
            response_model=None,
            operation_id=f"post{path.replace('/', '_')}",
        )

    both, either = (RerankRequest, TeiRequest), responses.RerankResponse | list[responses.TeiResult]
    add("/v2/rerank", COHERE_API, lambda _: COHERE_API, (CohereRequest,), responses.CohereResponse, "Cohere, version 2")
    add("/v1/rerank", JINA_API, rerank_api, both, either, "Jina, vLLM, Cohere's version 1; TEI by its texts")
    add("/rerank", JINA_API, rerank_api, both, either, "The same as /v1/rerank")
    for path in ("/v1/score", "/score"):
        add(path, SCORE_API, lambda _: SCORE_API, (ScoreRequest,), responses.ScoreResponse, "vLLM's scores of pairs")


def _add_state(app: FastAPI, service: Service) -> None:
    down: dict[int | str, dict[str, Any]] = {503: {"description": "It is not."}}

    @app.get("/ping", summary="The same as /health", responses=down)
    @app.get("/health", summary="Is the process alive? Restart it if not", responses=down)
    async def health() -> Response:
        alive = service.alive
        return json_response({"status": "ok" if alive else "dead"}, 200 if alive else 503)

    @app.get("/ready", summary="Does the model score? By a real pass, now or within the last 5 s", responses=down)
    async def ready() -> Response:
        why = await service.why_not_ready()
        return json_response(
            {"status": "not ready", "reason": why} if why else {"status": "ready"}, 503 if why else 200
        )

    @app.get("/metrics", summary="Counters for Prometheus", response_class=Response)
    async def metrics() -> Response:
        loop = asyncio.get_running_loop()
        try:
            page = await loop.run_in_executor(service.state_pool, service.metrics.page)
        except Exception as error:
            return _refused(service, error)
        return Response(page, media_type=CONTENT_TYPE_LATEST)


def _add_models(app: FastAPI, service: Service) -> None:
    async def guarded(request: Request, work: Callable[[], Any], pool: Executor = service.state_pool) -> Response:
        """Do something in a pool for those who have the key."""
        try:
            service.keys.check(request.headers.get("authorization"))
            loop = asyncio.get_running_loop()
            return json_response(await loop.run_in_executor(pool, work))
        except Exception as error:
            return _refused(service, error)

    def expect_key() -> None:
        if not service.keys:
            raise RequestError("forbidden", "models are loaded and deleted with a key only: start with --api-key")

    errors = describe_errors(OPENAI)

    @app.get("/info", summary="Version, models and limits", responses=errors)
    async def info(request: Request) -> Response:
        return await guarded(request, lambda: _info(service))

    @app.get("/v1/models", summary="Models", responses={200: {"model": responses.ModelList}, **errors})
    async def models(request: Request) -> Response:
        return await guarded(request, lambda: {"object": "list", "data": [_model(m) for m in service.models]})

    @app.post(
        "/v1/models",
        summary="Load an adapter from below --models-root",
        responses={200: {"model": responses.ModelInfo}, **errors},
        openapi_extra=body_of(LoadRequest),
    )
    async def load(request: Request) -> Response:
        try:
            service.keys.check(request.headers.get("authorization"))
            expect_key()
            service.expect_loaded()
            body = await read_body(request, service.spec.limits)
        except Exception as error:
            return _refused(service, error)

        def work() -> dict[str, Any]:
            asked = validate(LoadRequest, parse_object(body))
            return _model(service.models.load_below_root(asked.name, asked.adapter))

        return await guarded(request, work, service.loading_pool)

    @app.delete("/v1/models/{name:path}", summary="Forget a model", responses=errors)
    async def unload(request: Request, name: str) -> Response:
        def work() -> dict[str, Any]:
            expect_key()
            service.models.unload(name)
            return {"id": name, "object": "model", "deleted": True}

        return await guarded(request, work, service.loading_pool)


def _refused(service: Service, error: Exception) -> Response:
    """Count an error, and make its response."""
    failure = error if isinstance(error, RequestError) else unexpected(error)
    service.metrics.failed(failure.kind)
    return error_response(failure, OPENAI)


def _model(served: Any) -> dict[str, Any]:
    return {"id": served.name, "object": "model", "created": served.created, "owned_by": "qpeft"}


def _info(service: Service) -> dict[str, Any]:
    limits = service.spec.limits
    return {
        "version": VERSION,
        "models": [{"id": served.name, **served.limits} for served in service.models],
        "max_documents": limits.max_documents,
        "max_body_bytes": limits.max_body_bytes,
        "max_queue_tokens": limits.max_queue_tokens,
        "cache_bytes": service.spec.cache_bytes,
        "index_documents": 0 if service.cache.index is None else len(service.cache.index),
        "corpus_documents": 0 if service.corpus is None else len(service.corpus),
    }
