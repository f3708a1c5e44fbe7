"""Facts that say what results are made with."""

from __future__ import annotations

import datetime
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from ..utils.environment import machine, versions


@cache
def provenance() -> dict[str, Any]:
    """Return versions, commit, machine and date."""
    return {
        "versions": versions(),
        "commit": _commit(),
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
    }


def _commit() -> str | None:
    """Return the commit of the source tree that the package runs from; None for an installed package."""
    tree = Path(__file__).resolve().parents[2]
    if not (tree / ".git").exists():
        return None
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tree, capture_output=True, text=True, timeout=10)
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=tree, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return git.stdout.strip() + (" with changes" if changed.stdout.strip() else "") or None
