"""`RayReplicas`: servers in processes of their own on Ray Serve, which replaces those that die (extra: ray)."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import threading
from collections.abc import Callable, MutableMapping
from typing import Any

from ..ranking.ray_session import RaySession, enter
from .app import create_app
from .balancer import Answer, Forwarded
from .service import LOADING, Service
from .settings import ServeSpec

_NAME = "qpeft-{}"  # of an application of Ray Serve
_LEFT = 16  # requests for the state of a replica beside those for scores
_PATIENCE = 3.0  # seconds without an answer, after which it is asked whether there is a process


class RayReplicas:
    """Replicas of a server, one application of Ray Serve each: so each has its place when it is replaced.

    Args:
        spec: what each serves; its paths must be valid on every machine, relative ones below the working directory of
            this process. A disk cache has a folder for each.
        replicas: how many; None: one for each GPU of the cluster, or one.
    Attributes:
        replicas: by which the `Balancer` asks them.
        error: why one could not load its models; None so far.
    Raises: ImportError without Ray Serve; ValueError for replicas that Ray has no room for, or that failed at once.
    """

    def __init__(self, spec: ServeSpec, replicas: int | None) -> None:
        device = str(spec.lm_options.get("device") or "")
        self._session = RaySession([device] * (replicas or 0) or [device] * bool(device))
        self.error: Exception | None = None
        try:
            from ray import serve
        except ImportError:
            self._session.close()
            raise ImportError("qpeft serve --engine ray needs Ray Serve: pip install 'qpeft_ext[ray]'") from None
        logging.getLogger("ray.serve").setLevel(logging.CRITICAL)  # what goes wrong comes back as an exception
        self._serve = serve
        self._names = [_NAME.format(i) for i in range(self._session.actors)]
        try:
            serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
            self._handles = [self._run(i, spec) for i in range(self._session.actors)]
        except RuntimeError as error:
            self.stop()
            raise ValueError(f"Ray Serve cannot start a replica: {str(error).splitlines()[0]}") from error
        self.replicas = [_Handle(handle, self._session.ray, serve) for handle in self._handles]

    def _run(self, i: int, spec: ServeSpec) -> Any:
        """Start a replica. Returns: its handle."""
        gpu = self._session.kind == "cuda"
        lm_options = {**spec.lm_options, "device": self._session.kind}
        disk = None if spec.disk is None else (spec.disk[0] / f"replica-{i}", spec.disk[1])
        made = self._serve.deployment(
            _Replica,
            name="replica",
            num_replicas=1,
            max_ongoing_requests=spec.limits.max_requests + _LEFT,
            ray_actor_options={"num_gpus": int(gpu), "num_cpus": self._session.cpus},
        ).bind(dataclasses.replace(spec, lm_options=lm_options, disk=disk), os.getcwd())
        return self._serve.run(made, name=self._names[i], route_prefix=None)

    def start(self, on_failure: Callable[[], object] = lambda: None) -> None:
        """Wait for the models in a thread.

        Args:
            on_failure: called if a replica cannot load them, when `error` is set.
        """

        def wait() -> None:
            try:
                why = [handle.why_not_loaded.remote() for handle in self._handles]
                failed = next(filter(None, (each.result() for each in why)), "")
            except Exception as error:
                failed = f"a replica ended: {type(error).__name__}"
            if failed:
                self.error = ValueError(failed)
                on_failure()

        threading.Thread(target=wait, name=LOADING, daemon=True).start()

    def stop(self) -> None:
        """End the replicas when they have answered, and Ray if it was started here."""
        for name in self._names:
            self._serve.delete(name)
        self._session.close()


class _Handle:
    """A `balancer.Replica` by its handle.

    A call waits until there is a process, which takes long where a new one must start. So what has no answer for a
    while asks whether there is one, and until there is, nobody waits for it.
    """

    def __init__(self, handle: Any, ray: Any, serve: Any) -> None:
        self._handle = handle
        self._gone = (ray.exceptions.RayActorError, serve.exceptions.RayServeException)
        self._absent: asyncio.Future[None] | None = None  # done when there is a process again

    async def ask(self, request: Forwarded) -> Answer:
        """Answer a request. Raises: ConnectionError if the process is gone."""
        if self._absent is not None and not self._absent.done():
            raise ConnectionError("a new process is being started")
        answer = asyncio.ensure_future(self._call(self._handle.ask, request))
        try:
            done, _ = await asyncio.wait({answer}, timeout=_PATIENCE)
            if not done:
                runs = asyncio.ensure_future(self._call(self._handle.runs))
                done, _ = await asyncio.wait({answer, runs}, timeout=_PATIENCE, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    self._absent = runs
                    raise ConnectionError("there is no process")
            return await answer
        finally:
            answer.cancel()

    async def _call(self, method: Any, *arguments: Any) -> Any:
        answer = method.remote(*arguments)
        try:
            return await answer
        except self._gone as error:
            raise ConnectionError(type(error).__name__) from error
        except asyncio.CancelledError:
            answer.cancel()
            raise


class _Replica:
    """A whole server but for its socket, in an actor of Ray Serve."""

    def __init__(self, spec: ServeSpec, folder: str) -> None:
        enter(folder)
        self._service = Service(spec)
        self._app = create_app(self._service)
        self._service.start()

    async def why_not_loaded(self) -> str:
        """Wait until the models are loaded. Returns: why they cannot be, or ""."""
        while self._service.error is None and not self._service.wait_until_loaded(0):
            await asyncio.sleep(0.1)
        return str(self._service.error or "")

    async def runs(self) -> None:
        """Return as soon as there is a process."""

    async def ask(self, request: Forwarded) -> Answer:
        """Answer a request."""
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "http",
            "method": request.method,
            "path": request.path,
            "raw_path": request.path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": list(request.headers),
            "client": None,
            "server": None,
        }
        arrived = [{"type": "http.request", "body": request.body, "more_body": False}]
        sent: list[MutableMapping[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if arrived:
                return arrived.pop()
            return await asyncio.Future()  # whoever leaves cancels this call

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message)

        await self._app(scope, receive, send)
        body = b"".join(message.get("body", b"") for message in sent[1:])
        route = getattr(scope.get("route"), "path", "other")
        counts = scope.get("state", {}).get("qpeft", {})
        return Answer(sent[0]["status"], tuple(map(tuple, sent[0]["headers"])), body, route, counts)

    def check_health(self) -> None:
        """Raises: RuntimeError if only a restart helps; Ray Serve calls this."""
        if not self._service.alive:
            raise RuntimeError("the scoring thread has ended, or the models cannot be loaded")

    def __del__(self) -> None:
        self._service.stop()
