"""Reading the body of a request: bounded in bytes and in time, and parsed outside of the event loop."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

import pydantic_core
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from .errors import RequestError
from .settings import Limits

Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, limits: Limits) -> bytes:
    """Read the body. Raises: RequestError if it is too large or too slow, or the client has gone."""
    too_large = RequestError("too_large", f"the body is larger than {limits.max_body_bytes} bytes; send it in parts")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > limits.max_body_bytes):
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.body_timeout):
            async for part in request.stream():
                size += len(part)
                if size > limits.max_body_bytes:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise RequestError("slow_body", f"the body did not arrive within {limits.body_timeout:g} s") from None
    except ClientDisconnect:
        raise RequestError("cancelled", "the client has gone") from None
    return b"".join(parts)


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises: RequestError if it is none."""
    try:
        parsed = pydantic_core.from_json(body)
    except ValueError as error:
        raise RequestError("invalid", f"the body is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise RequestError("invalid", f"the body must be a JSON object, got {type(parsed).__name__}")
    return parsed


def validate(kind: type[Body], parsed: dict[str, Any]) -> Body:
    """Check an object against a schema. Raises: RequestError that names the first wrong field."""
    try:
        return kind.model_validate(parsed)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place, message = wrong["loc"], wrong["msg"].removeprefix("Value error, ")
        field = str(place[0]) if place else None
        if field is None:
            raise RequestError("invalid", message) from None
        name = field + "".join(f"[{part}]" for part in place[1:2] if isinstance(part, int))
        if name != field and len(place) > 2:  # an item that is neither of the kinds that it may be
            message = "expected a text, or an object with a text or an id"
        kind_of_error = "empty" if wrong["type"] in ("too_short", "string_too_short") else "invalid"
        raise RequestError(kind_of_error, f"{name}: {message}", field) from None
