"""Requests that cannot be answered, and the body that a client of each kind expects then."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from traceback import walk_tb
from typing import Any

from ..utils.memory import is_out_of_memory

logger = logging.getLogger(__name__)

_STATUS = {
    "invalid": 422,
    "empty": 422,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "not_allowed": 405,
    "slow_body": 408,
    "too_large": 413,
    "overloaded": 429,
    "cancelled": 499,
    "backend": 500,
    "not_ready": 503,
    "timeout": 504,
}


class RequestError(Exception):
    """A request that cannot be answered.

    Args:
        kind: a key of the table of statuses, such as "invalid" or "overloaded".
        message: one line: what is wrong, what was expected, what to do.
        param: the field of the body that is wrong, if it is one.
        retry_after: seconds after which the client may try again.
    """

    def __init__(self, kind: str, message: str, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.param = param
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return headers | ({"www-authenticate": "Bearer"} if self.kind == "unauthorized" else {})


def unexpected(error: Exception) -> RequestError:
    """Log an error that is no `RequestError`, by its class and place, for its text may be a user's.

    Returns: what the client is told: that memory is short, or the class of the error.
    """
    if is_out_of_memory(error):
        failure = RequestError("not_ready", "the server is out of memory; try again later", retry_after=5)
    else:
        failure = RequestError("backend", f"the server failed on this request ({type(error).__name__})")
    frames = [(frame.f_globals.get("__name__"), line) for frame, line in walk_tb(error.__traceback__)]
    place = "{}:{}".format(*frames[-1]) if frames else "an unknown place"
    logger.error("a request failed (%s): %s at %s", failure.kind, type(error).__name__, place)
    logger.debug("why it failed", exc_info=error)
    return failure


@dataclass(frozen=True)
class ErrorShape:
    """How the clients of one route read an error.

    Attributes:
        body: makes the body of an error and its status.
        statuses: statuses that differ from the usual ones.
    """

    body: Callable[[RequestError, int], dict[str, Any]]
    statuses: dict[str, int]

    def status(self, error: RequestError) -> int:
        """Return the HTTP status of an error."""
        return self.statuses.get(error.kind, _STATUS[error.kind])

    def render(self, error: RequestError) -> tuple[int, dict[str, Any]]:
        """Return status and body of an error."""
        status = self.status(error)
        return status, self.body(error, status)


def _openai(error: RequestError, status: int) -> dict[str, Any]:
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": status}}


def _tei(error: RequestError, status: int) -> dict[str, Any]:
    kinds = {"not_ready": "unhealthy", "overloaded": "overloaded", "empty": "empty"}
    kind = kinds.get(error.kind, "backend" if status >= 424 else "validation")
    return {"error": error.message, "error_type": kind}


COHERE = ErrorShape(lambda error, status: {"message": error.message}, {"invalid": 400, "empty": 400})
# clients of Jina read `detail`, those of vLLM `error`, of Cohere's first version `message`, all on the same route
JINA = ErrorShape(
    lambda error, status: {"detail": error.message, "message": error.message} | _openai(error, status), {}
)
OPENAI = ErrorShape(_openai, {"invalid": 400, "empty": 400})
TEI = ErrorShape(_tei, {"empty": 400, "backend": 424})
