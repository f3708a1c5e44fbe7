"""One decision for all progress bars: when they are shown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


def progress_bar(items: Iterable[Any] | None = None, *, show: bool | None = None, **options: Any) -> tqdm:
    """Return a progress bar of tqdm over ``items``, or one that the caller updates.

    Args:
        items: what is iterated over; None for a bar with ``total`` in the options.
        show: whether the bar is shown; None shows it on a terminal only.
        options: further arguments of tqdm: ``total``, ``desc``, ``unit``, ``delay``, ….
    """
    return tqdm(items, disable=None if show is None else not show, **options)
