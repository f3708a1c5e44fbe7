"""What HTML pages of results share: the page with its style, and plots in its colours. No script, no other file."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html import escape

INK = "#123456"  # drawn by matplotlib, then replaced by the page's text colour, which depends on light and dark


def page(title: str, body: str) -> str:
    """A whole page; ``body`` is HTML."""
    return _PAGE.format(title=escape(title), style=_STYLE, body=body)


def draw_svg(draw: Callable, size: tuple[float, float], label: str) -> str:
    """SVG of a matplotlib figure of that size in inches, which ``draw`` fills; the same bytes for the same drawing.

    label: what it shows, for those who cannot see it. Raises: ImportError without matplotlib.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("the report's plot needs the package matplotlib: pip install qpeft_ext[plot]") from None
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "qpeft",
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def plain(text: str) -> str:
    """Text that matplotlib leaves as it is; it would typeset what stands between two dollars."""
    return text.replace("$", r"\$")


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_STYLE = """:root { color-scheme: light dark; --ink: #1c2126; --soft: #5b6570; --line: #d5dae0; --paper: #ffffff;
  --card: #f6f7f9; --clue: 255 176 32; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ea; --soft: #a3adb8; --line: #3a424b; --paper: #15181c; --card: #1e2329; --clue: 190 120 0; } }
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { margin-top: 2.2rem; font-size: 1.25rem; }
h3 { margin: 0; font-size: 1rem; } .part { margin: 1.6rem 0 .4rem; }
.lead { font-size: 1.05rem; } .note { margin: .2rem 0; color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 600; white-space: nowrap; }
.measures td, .measures thead th + th { text-align: right; padding: .35rem .3rem; }
.measures thead th { white-space: normal; vertical-align: bottom; max-width: 9rem; }
td small { display: block; color: var(--soft); white-space: nowrap; }
.setting td { overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; } figure svg { width: 100%; height: auto; }
section { margin: 1.2rem 0; padding: 1rem; border: 1px solid var(--line); border-radius: 6px; background: var(--card); }
.document { margin-top: .6rem; font: 13.5px/1.6 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
mark { background: rgb(var(--clue) / var(--w)); color: inherit; border-radius: 2px; }
"""
