"""The process of ``qpeft serve``: socket, log, signals."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn

from ..utils.console import say
from . import access_log
from .app import create_app
from .service import Service
from .settings import ServeSpec


def serve(spec: ServeSpec, host: str, port: int, drain_seconds: int, log_level: str) -> None:
    """Serve until SIGTERM or SIGINT, then answer what has been asked and return.

    Args:
        spec: what is served.
        host, port: where to listen; port 0 takes a free one.
        drain_seconds: how long requests may take to end.
        log_level: "debug", "info", "warning" or "error".
    Raises: OSError if the address is in use; whatever is wrong with a model, a cache or a corpus.
    """
    with _logging(log_level), _listen(host, port) as listening:
        service = Service(spec)
        config = uvicorn.Config(
            create_app(service, lambda: setattr(server, "should_exit", True)),
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=drain_seconds,
            server_header=False,
        )
        server = uvicorn.Server(config)
        before = signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again after it has drained
        try:
            address = f"[{host}]" if ":" in host else host
            say(f"qpeft serve: http://{address}:{listening.getsockname()[1]} (/docs describes the routes)")
            sys.stdout.flush()
            server.run(sockets=[listening])
        finally:
            signal.signal(signal.SIGTERM, before)
    if service.error is not None:
        raise service.error


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"cannot listen on {host} port {port}: {reason}; choose another --host or --port") from None


@contextlib.contextmanager
def _logging(level: str) -> Iterator[None]:
    """Log requests as lines of JSON, and everything else as text, on stderr."""
    lines, text = logging.StreamHandler(sys.stderr), logging.StreamHandler(sys.stderr)
    text.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    requests, ours, server = access_log.logger, logging.getLogger("qpeft_ext"), logging.getLogger("uvicorn")
    before = [(logger, logger.level, logger.propagate) for logger in (requests, ours, server)]
    requests.addHandler(lines)
    ours.addHandler(text)
    requests.propagate = False
    requests.setLevel(logging.INFO if level in ("debug", "info") else logging.CRITICAL)
    ours.setLevel(level.upper())
    server.setLevel(logging.DEBUG if level == "debug" else logging.CRITICAL)
    try:
        yield
    finally:
        requests.removeHandler(lines)
        ours.removeHandler(text)
        for logger, old, propagate in before:
            logger.setLevel(old)
            logger.propagate = propagate
