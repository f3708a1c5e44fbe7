"""Versions and hardware."""

from __future__ import annotations

import os
import platform
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


def versions() -> dict[str, str]:
    """qpeft_ext, Python and the packages that matter; "not installed" for those that are not."""

    rows = {"qpeft_ext": VERSION, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            rows[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            rows[name] = "not installed"
    return rows


def machine() -> dict[str, str]:
    """CPU, threads and devices."""
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
