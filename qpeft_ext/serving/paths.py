"""Paths as clients write them: ``http://host:8080/`` with ``/rerank`` behind it makes ``//rerank``."""

from __future__ import annotations

from typing import Any


class PlainPaths:
    """ASGI middleware that drops slashes around a path, and answers HEAD as GET.

    A redirect would not do: it would have to name the server, which behind a proxy does not know its address, and
    clients would take the key to wherever it points.

    Args:
        app: what answers.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            method = "GET" if scope["method"] == "HEAD" else scope["method"]  # the server sends no body for HEAD
            scope = scope | {"path": f"/{scope['path'].strip('/')}", "method": method}
        await self.app(scope, receive, send)
