"""Versions of packages, and the hardware."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib import metadata

VERSION = "0.1.0"  # the same as in pyproject.toml
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "numpy",
    "bm25s",
    "ir_measures",
    "scipy",
    "matplotlib",
)


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of qpeft_ext, of Python and of ``packages``; "not installed" for a missing one."""
    rows = {"qpeft_ext": VERSION, "python": platform.python_version()}
    for name in packages:
        try:
            rows[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            rows[name] = "not installed"
    return rows


def machine() -> dict[str, str]:
    """Return the name of the CPU, the number of threads, and the devices."""
    import torch

    rows = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": f"{_cpu_name()}; torch uses {torch.backends.cpu.get_cpu_capability()} code",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "cuda": "no device" if torch.version.cuda else "torch is a build without CUDA",
    }
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        name = f"cuda:{index}" if index else "cuda"
        rows[name] = f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB"
    return rows


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
