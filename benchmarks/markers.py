"""Computed tables of README.md and docs/*.md: each stands between ``<!-- KIND: NAME -->`` and ``<!-- end -->``.

`readme_tables.py` writes the kinds "results", "runtimes", "quality" and "demo", `trainable_parameters.py` "parameters",
and `scaling.py` "scaling". With ``--check`` they only look whether the pages show what they compute.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent


def pages() -> list[Path]:
    """README.md and the pages in docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def names(kind: str) -> list[str]:
    """Names of the tables of a kind that the pages show, in the order of the pages."""
    return [name for page in pages() for name in re.findall(rf"<!-- {kind}: (\S+) -->", page.read_text("utf-8"))]


def fill(text: str, kind: str, make: Callable[[str], str]) -> str:
    """A page with its tables of a kind made anew: ``make(name)`` is what stands between the markers."""
    between = re.compile(rf"(<!-- {kind}: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return between.sub(lambda match: match[1] + make(match[2]) + match[3], text)


def write_tables(kind: str, make: Callable[[str, Path], str], check: bool) -> list[Path]:
    """Write all tables of a kind: ``make(name, page)`` gives one. Returns: the pages that were not up to date.

    Args:
        check: change no page.
    """
    outdated = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = fill(text, kind, lambda name, page=page: make(name, page))
        if new != text:
            outdated.append(page)
            if not check:
                page.write_text(new, encoding="utf-8")
    return outdated


def report(outdated: list[Path], check: bool, command: str) -> int:
    """Print which pages are out of date where they were only checked. Returns: the exit status."""
    if check and outdated:
        shown = ", ".join(str(page.relative_to(ROOT)) for page in dict.fromkeys(outdated))
        print(f"{shown}: not what the results and programs say; run python {command}")
    return int(check and bool(outdated))
