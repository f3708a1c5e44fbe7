"""``qpeft info``: versions, hardware, which kernels are live and why others are not."""

from __future__ import annotations

import os
import platform
from importlib import metadata

PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "bm25s", "ir_measures", "scipy",
            "matplotlib")


def command() -> None:
    """Print versions, devices, and which compiled kernels run here (and why others do not)."""
    from rich.table import Table

    from .common import say

    for title, rows in (("versions", versions()), ("machine", machine()), ("kernels", kernels()), ("build", build())):
        table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(name, value)
        say(table)
        say()


def versions() -> dict[str, str]:
    """qpeft_ext, Python and the packages that matter; "not installed" for those that are not."""
    from .. import __version__

    rows = {"qpeft_ext": __version__, "python": platform.python_version()}
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


def kernels() -> dict[str, str]:
    """For every kind of device: live, or the reason why the PyTorch definitions run instead."""
    from ..ops import _library

    return {device: f"{'live' if live else 'not live'}: {reason}"
            for device, (live, reason) in _library.kernels_live().items()}


def build() -> dict[str, str]:
    """How the library was built."""
    from ..ops import _library

    return {name: str(value) for name, value in _library.build_info().items() if value not in ("", None)}


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
