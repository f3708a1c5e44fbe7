"""Plots of results as SVG, in the text colour of the page that they stand in."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib draws with this colour; in the SVG the page's text colour replaces it, which depends on light and dark.
INK = "#123456"
BASELINE, SYSTEM, LOSS = "#8a93a0", "#3f7fd0", "#d0673f"


def draw_svg(draw: Callable[[Figure], None], size: tuple[float, float], label: str) -> Markup:
    """Draw a matplotlib figure as SVG; the same drawing gives the same bytes.

    Args:
        draw: fills the figure that it is given.
        size: width and height in inches.
        label: what the figure shows, for readers who cannot see it.

    Raises: ImportError without matplotlib.
    """
    from markupsafe import Markup, escape

    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("the report's plot needs the package matplotlib: pip install 'qpeft_ext[plot]'") from None
    style: dict[Any, Any] = {
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
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))


def plain(text: str) -> str:
    """Return text that matplotlib shows as it is; it would typeset what stands between two dollar signs."""
    return text.replace("$", r"\$")


def mean_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Compute the 95 % bootstrap interval of a mean, from 2,000 seeded resamples of the queries."""
    data = np.asarray(values)
    draws = np.random.default_rng(seed).integers(0, len(data), (2000, len(data)))
    low, high = np.percentile(data[draws].mean(axis=1), (2.5, 97.5))
    return float(low), float(high)


def draw_means(axes: Axes, values: Mapping[str, Sequence[float]], baselines: Collection[str], label: str) -> None:
    """Draw the mean of each system as a bar with its 95 % interval, the first system on top.

    Args:
        values: name of a system -> its value for each query.
        baselines: names of ``values`` that are drawn in grey.
        label: text below the axis.
    """
    means = [float(np.mean(of_queries)) for of_queries in values.values()]
    bounds = [mean_interval(of_queries) for of_queries in values.values()]
    errors = [
        [mean - low for mean, (low, _) in zip(means, bounds, strict=True)],
        [high - mean for mean, (_, high) in zip(means, bounds, strict=True)],
    ]
    axes.barh(
        range(len(means)),
        means,
        xerr=np.maximum(errors, 0),
        color=[BASELINE if name in baselines else SYSTEM for name in values],
        height=0.62,
        error_kw={"ecolor": INK, "capsize": 3, "elinewidth": 1},
    )
    for bar, (mean, (_, high)) in enumerate(zip(means, bounds, strict=True)):
        axes.annotate(f"{mean:.3f}", (high, bar), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(means)), [plain(name) for name in values])
    axes.invert_yaxis()
    axes.set_xlim(0, max(high for _, high in bounds) * 1.15 + 1e-6)
    axes.set_xlabel(label)
