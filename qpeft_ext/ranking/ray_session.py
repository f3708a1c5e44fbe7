"""`RaySession`: the Ray that actors run on (extra: ray)."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any


class RaySession:
    """The Ray that runs on this machine, or that ``RAY_ADDRESS`` names; otherwise one is started here until `close`.

    Args:
        devices: one actor each, "cuda" or "cpu"; Ray chooses the GPU. "" stands for a GPU if the cluster has any, else
            for CPUs. Without any device there is one actor for each GPU of the cluster, or one CPU actor.
    Attributes:
        ray: the package.
        kind: "cuda" or "cpu", of all actors.
        actors: how many there are to be.
        cpus: of each; Ray gives an actor as many threads.
    Raises: ImportError without Ray; ValueError for devices that Ray does not have.
    """

    def __init__(self, devices: Sequence[str] = ()) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what goes wrong comes back as an exception
        try:
            import ray
        except ImportError:
            raise ImportError("--engine ray needs Ray: pip install 'qpeft_ext[ray]'") from None
        logging.getLogger("ray").setLevel(logging.ERROR)
        self.ray = ray
        self._ours = not ray.is_initialized()
        if self._ours:
            options: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
            size = {"num_cpus": max(len(devices), os.cpu_count() or 1), "include_dashboard": False}
            try:
                ray.init(**options, **({} if os.environ.get("RAY_ADDRESS") else size))
            except ValueError:  # one that `ray start` has started on this machine is found, and has a size already
                ray.init(**options)
        gpus = int(ray.cluster_resources().get("GPU", 0))
        kinds = {device.partition(":")[0] for device in devices if device} or {"cuda" if gpus else "cpu"}
        self.kind = kinds.pop()
        self.actors = len(devices) or gpus or 1
        wrong = ""
        if kinds or self.kind not in ("cuda", "cpu"):
            wrong = f"--devices with --engine ray must be all cuda or all cpu, got {', '.join(devices)}"
        elif self.kind == "cuda" and gpus < self.actors:
            wrong = f"{self.actors} GPUs are asked for, Ray has {gpus}"
        # each actor must fit on one machine
        machines = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
        if sum(machines) < self.actors:
            wrong = wrong or f"{self.actors} CPUs are asked for, Ray has {sum(machines):g}"
        if wrong:
            self.close()
            raise ValueError(wrong)
        self.cpus = 1 if self.kind == "cuda" else max(1, int(min(sum(machines) // self.actors, max(machines))))

    def close(self) -> None:
        """Stop the Ray that was started here; one that ran before keeps running."""
        if self._ours:
            self.ray.shutdown()
            self._ours = False


def enter(folder: str) -> None:
    """Make the folder where a command was started that of an actor, whose own is where Ray was started.

    Args:
        folder: an absolute path; where it does not exist nothing is done, and relative paths are not found.
    """
    if os.path.isdir(folder):
        os.chdir(folder)
