"""Descriptions of bodies that are read by us and not by FastAPI, for the page ``/docs``."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from .errors import ErrorShape, RequestError

_REF = "#/components/schemas/{model}"
_ERRORS = {
    "invalid": "A field is wrong.",
    "empty": "There is no query or no document.",
    "unauthorized": "The key is missing or wrong.",
    "forbidden": "The server does not allow this.",
    "not_found": "There is no such model.",
    "slow_body": "The body came too slowly.",
    "too_large": "The body is too large.",
    "overloaded": "Too much waits already; `retry-after` says for how long.",
    "cancelled": "The client has gone.",
    "backend": "The model failed.",
    "not_ready": "The model is being loaded, or out of memory.",
    "timeout": "It took too long.",
}


def body_of(*kinds: type[BaseModel]) -> dict[str, Any]:
    """Describe a JSON body of one of these kinds."""
    schemas = [{"$ref": _REF.format(model=kind.__name__)} for kind in kinds]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe_errors(*shapes: ErrorShape) -> dict[int | str, dict[str, Any]]:
    """Describe the errors of a route that has bodies of these shapes, by status."""
    described: dict[int | str, dict[str, Any]] = {}
    for shape in shapes:
        for kind, text in _ERRORS.items():
            status, example = shape.render(RequestError(kind, text))
            described.setdefault(status, {"description": text, "content": {"application/json": {"example": example}}})
    return described


def with_bodies(app: FastAPI, kinds: tuple[type[BaseModel], ...]) -> None:
    """Put the schemas of bodies into the description of an app, where `body_of` refers to them."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            described = made()
            _, definitions = models_json_schema([(kind, "validation") for kind in kinds], ref_template=_REF)
            described.setdefault("components", {}).setdefault("schemas", {}).update(definitions.get("$defs", {}))
            app.openapi_schema = described
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's documentation says
