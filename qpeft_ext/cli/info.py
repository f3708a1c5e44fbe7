"""``qpeft info``: versions, hardware, and which kernels are used and why others are not."""

from __future__ import annotations

from ..utils.environment import machine, versions


def command() -> None:
    """Print versions, devices, and which kernels run here.

    Kernels that do not run are listed with the reason.
    """
    from rich.table import Table

    from ..utils.console import say

    for title, rows in (("versions", versions()), ("machine", machine()), ("kernels", kernels()), ("build", build())):
        table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(name, value)
        say(table)
        say()


def kernels() -> dict[str, str]:
    """Return for every kind of device: live, or the reason why the PyTorch definitions run instead."""
    from ..ops import _library

    return {
        device: f"{'live' if live else 'not live'}: {reason}"
        for device, (live, reason) in _library.kernels_live().items()
    }


def build() -> dict[str, str]:
    """Return how the library was built."""
    from ..ops import _library

    return {name: str(value) for name, value in _library.build_info().items() if value not in ("", None)}
