"""Bodies of responses, one kind for each API. What was not asked for is left out: ``null`` breaks clients."""

from __future__ import annotations

import time
from typing import Any

from pydantic import BaseModel

from .ranked import Ranked, Result


class Span(BaseModel):
    """Characters of a document, end exclusive."""

    start: int
    end: int
    score: float


class Passage(BaseModel):
    """Characters of a document's own text, end exclusive."""

    start: int
    end: int


class CohereResult(BaseModel):
    index: int
    relevance_score: float
    passage: Passage | None = None
    relevant_spans: list[Span] | None = None
    document: DocumentText | None = None


class DocumentText(BaseModel):
    text: str
    id: str | None = None


class Meta(BaseModel):
    """Counts of tokens, and what was cut, in words."""

    api_version: dict[str, str]
    billed_units: dict[str, int]
    tokens: dict[str, int]
    cached_tokens: int
    warnings: list[str] | None = None


class CohereResponse(BaseModel):
    id: str
    results: list[CohereResult]
    meta: Meta


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class RerankResponse(CohereResponse):
    model: str
    usage: Usage


class TeiResult(BaseModel):
    index: int
    score: float
    text: str | None = None


class ScoreResult(BaseModel):
    index: int
    object: str
    score: float


class ScoreResponse(BaseModel):
    id: str
    object: str
    created: int
    model: str
    data: list[ScoreResult]
    usage: Usage
    meta: Meta


class ModelInfo(BaseModel):
    id: str
    object: str
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: str
    data: list[ModelInfo]


def cohere(ranked: Ranked, version: str = "2") -> dict[str, Any]:
    """Make the body for ``/v2/rerank``."""
    return {
        "id": ranked.request_id,
        "results": [_result(result) for result in ranked.best],
        "meta": _meta(ranked, version),
    }


def jina(ranked: Ranked) -> dict[str, Any]:
    """Make the body for ``/rerank`` and ``/v1/rerank``."""
    return {"model": ranked.model, "usage": _usage(ranked), **cohere(ranked, "1")}


def tei(ranked: Ranked) -> list[dict[str, Any]]:
    """Make the body for ``/rerank`` with ``texts``."""
    return [
        {"index": result.index, "score": result.score} | ({} if result.text is None else {"text": result.text})
        for result in ranked.best
    ]


def scores(ranked: Ranked) -> dict[str, Any]:
    """Make the body for ``/score``; in the order of the request."""
    return {
        "id": ranked.request_id,
        "object": "list",
        "created": int(time.time()),
        "model": ranked.model,
        "data": [{"index": result.index, "object": "score", "score": result.score} for result in ranked.results],
        "usage": _usage(ranked),
        "meta": _meta(ranked, "1"),
    }


def _result(result: Result) -> dict[str, Any]:
    body: dict[str, Any] = {"index": result.index, "relevance_score": result.score}
    if result.passage is not None:
        body["passage"] = {"start": result.passage[0], "end": result.passage[1]}
    if result.spans is not None:
        body["relevant_spans"] = result.spans
    if result.text is not None:
        body["document"] = {"text": result.text} | ({} if result.doc_id is None else {"id": result.doc_id})
    return body


def _usage(ranked: Ranked) -> dict[str, int]:
    return {"prompt_tokens": ranked.input_tokens, "total_tokens": ranked.input_tokens}


def _meta(ranked: Ranked, version: str) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "api_version": {"version": version},
        "billed_units": {"search_units": 1},
        "tokens": {"input_tokens": ranked.input_tokens, "output_tokens": 0},
        "cached_tokens": ranked.cached_tokens,
    }
    return meta | ({"warnings": ranked.warnings} if ranked.warnings else {})
