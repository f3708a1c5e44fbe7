"""One line of JSON for each request: route, status, times and counts, and no text, path, address or key."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

logger = logging.getLogger(__name__)


class AccessLog:
    """ASGI middleware that logs and counts responses.

    Args:
        app: what answers.
        answered: called with the route, the status and the seconds of each response.
    """

    def __init__(self, app: Any, answered: Callable[[str, int, float], object]) -> None:
        self.app, self._answered = app, answered

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 499

        async def observed(message: dict) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        scope.setdefault("state", {})
        try:
            await self.app(scope, receive, observed)
        finally:
            route = getattr(scope.get("route"), "path", "other")  # the pattern: a path may hold anything
            seconds = time.monotonic() - started
            self._answered(route, status, seconds)
            logger.info(
                "%s",
                json.dumps(
                    {
                        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                        "route": route,
                        "status": status,
                        "ms": round(1000 * seconds, 1),
                        **scope["state"].get("qpeft", {}),
                    }
                ),
            )
