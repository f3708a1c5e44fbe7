"""The process of ``qpeft serve``: socket, log, signals."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import uvicorn

from ..utils.console import say
from . import access_log
from .app import create_app
from .balancer import Balancer, with_lifespan
from .paths import PlainPaths
from .service import LOADING, Service
from .settings import ServeSpec

# Seconds. Proxies (nginx, load balancers of clouds) use a connection again that was idle for 60 s; with uvicorn's 5 s
# they would send requests into connections that are being closed, which their clients see as status 502
_KEEP_ALIVE = 75


class Work(Protocol):
    """A `Service` or `RayReplicas`, which an app is in front of."""

    error: Exception | None


def serve(spec: ServeSpec, host: str, port: int, drain_seconds: int, log_level: str) -> None:
    """Serve until SIGTERM or SIGINT, then answer what has been asked and return.

    A signal that comes while the models are being loaded ends the process.

    Args:
        spec: what is served.
        host, port: where to listen; port 0 takes a free one.
        drain_seconds: how long requests may take to end.
        log_level: "debug", "info", "warning" or "error".
    Raises: OSError if the address is in use; whatever is wrong with a model, a cache or a corpus.
    """
    _serve(lambda: Service(spec), create_app, host, port, drain_seconds, log_level)


def serve_on_ray(
    spec: ServeSpec, replicas: int | None, host: str, port: int, drain_seconds: int, log_level: str
) -> None:
    """Do as `serve`, with replicas on Ray Serve behind one address.

    Args:
        replicas: as for `RayReplicas`.
    Raises: as `serve` and `RayReplicas`.
    """
    from .ray_replicas import RayReplicas

    def balanced(work: RayReplicas, on_failure: Callable[[], object]) -> Any:
        logged = access_log.AccessLog(Balancer(spec, work.replicas), lambda *_: None)  # the replicas count
        return with_lifespan(PlainPaths(logged), lambda: work.start(on_failure), work.stop)

    _serve(lambda: RayReplicas(spec, replicas), balanced, host, port, drain_seconds, log_level)


def _serve(
    make: Callable[[], Any],
    app_of: Callable[[Any, Callable[[], object]], Any],
    host: str,
    port: int,
    drain_seconds: int,
    log_level: str,
) -> None:
    """Listen, make what works, and serve its app until a signal comes, or the app says that it cannot work."""
    with _logging(log_level), _listen(host, port) as listening:
        work: Work = make()

        def leave(*_: Any) -> None:
            server.should_exit = True

        config = uvicorn.Config(
            app_of(work, leave),
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=drain_seconds,
            timeout_keep_alive=_KEEP_ALIVE,
            server_header=False,
        )
        server = uvicorn.Server(config)
        # for a signal before uvicorn looks at them; after it has drained, it raises its own again
        before = signal.signal(signal.SIGTERM, leave)
        try:
            address = f"[{host}]" if ":" in host else host
            say(f"qpeft serve: http://{address}:{listening.getsockname()[1]} (/docs describes the routes)")
            sys.stdout.flush()
            server.run(sockets=[listening])
            if work.error is None:
                _end_with_loading(0)
        except KeyboardInterrupt:
            _end_with_loading(130)
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if work.error is not None:
        raise work.error


def _end_with_loading(code: int) -> None:
    """End the process if a thread still loads models, which cannot be told to stop.

    Python's own end would cut it off inside of C++, which aborts: "terminate called without an active exception".
    """
    if any(thread.name == LOADING for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


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
