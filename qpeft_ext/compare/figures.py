"""Plots of a comparison: quality, quality against cost, and quality against an option that was varied."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ..evaluation.plots import BASELINE, INK, SYSTEM, draw_means, draw_svg, plain
from ..utils.words import counted
from .label_places import label_places
from .methods import UPR
from .plan import Plan
from .sections import numbered
from .tables import COSTS, CollectionTable, Row

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINES = ("#3f7fd0", "#d0673f", "#3a9d6e", "#9b6bd0", "#b8902a", "#c2557f", "#4a9fb8")
_AGAINST_COST = ("documents_per_second", "queries_per_petaflop", "trainable")


def mean_figure(table: CollectionTable) -> Markup:
    """Draw the mean of each method in the first measure, with its interval over queries."""
    measure, names = table.measures[0], numbered(table.rows)
    values = {name: list(row.per_query[measure].values()) for name, row in zip(names, table.rows, strict=True)}
    baselines = [name for name, row in zip(names, table.rows, strict=True) if row.name in table.baselines.values()]
    count = len(next(iter(values.values())))
    label = f"{measure}: mean of {counted(count, 'queries')}, 95 % interval over queries (bootstrap)"

    def draw(figure: Figure) -> None:
        draw_means(figure.subplots(), values, baselines, label)

    size = 9, max(2.0, 1.0 + 0.34 * len(values))
    return draw_svg(draw, size, f"Mean {measure} of each method on {table.collection}")


def cost_figures(table: CollectionTable) -> list[Markup]:
    """Draw quality against cost, with a panel for each cost that any method has; empty where none has one."""
    panels = [name for name in _AGAINST_COST if any(row.cost[name] for row in table.rows)]
    if not panels:
        return []

    def draw(figure: Figure) -> None:
        every_axes = figure.subplots(1, len(panels), squeeze=False)[0]
        points = [_draw_cost(axes, name, table) for axes, name in zip(every_axes, panels, strict=True)]
        every_axes[0].set_ylabel(table.measures[0])
        figure.draw_without_rendering()  # settles the layout, on which places of the numbers depend
        for axes, of_panel in zip(every_axes, points, strict=True):
            _number_points(axes, of_panel)

    label = f"{table.measures[0]} against {', '.join(COSTS[name].heading for name in panels)}, on {table.collection}"
    return [draw_svg(draw, (3.3 * max(2, len(panels)), 3.6), label)]


def _draw_cost(axes: Axes, name: str, table: CollectionTable) -> list[tuple[str, float, float]]:
    """Draw the methods in one panel. Returns: the label, x and y of each point; labels are numbers of the tables."""
    measure = table.measures[0]
    floor = 0.5 * float(np.median([row.means[measure] for row in table.rows]))  # below: at the edge of the plot
    costs = [(number, row.cost[name], row.means[measure]) for number, row in enumerate(table.rows, start=1)]
    points = [(number, x, y) for number, x, y in costs if x is not None]
    is_log = _use_log_scale(axes, [x for _, x, _ in points])
    inside, far = ([p for p in points if (p[2] < floor) == low] for low in (False, True))
    axes.scatter([x for _, x, _ in inside], [y for *_, y in inside], s=22, color=SYSTEM, zorder=3)
    axes.margins(x=0.12, y=0.12)
    bottom = axes.get_ylim()[0]
    axes.scatter([x for _, x, _ in far], [bottom] * len(far), s=22, color=SYSTEM, zorder=3, marker="v", clip_on=False)
    axes.set_ylim(bottom=bottom)
    axes.set_xlabel(COSTS[name].heading + (", logarithmic" if is_log else ""), fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(True, color=BASELINE, alpha=0.25, linewidth=0.6)
    return [(str(number), x, y) for number, x, y in inside] + [(f"{n} ({y:.2f})", x, bottom) for n, x, y in far]


def _use_log_scale(axes: Axes, values: Sequence[float]) -> bool:
    """Make the x axis logarithmic if the values span more than a factor of 5 or contain 0, which stands at its left.

    Returns: whether it is.
    """
    from matplotlib.ticker import EngFormatter, LogLocator

    positive = [x for x in values if x > 0]
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if max(positive) < 5 * min(positive) and len(positive) == len(values):
        axes.locator_params(axis="x", nbins=5)
        return False
    if len(positive) == len(values):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if max(positive) < 100 * min(positive) else (1,)))
    else:
        axes.set_xscale("symlog", linthresh=min(positive))
        axes.set_xticks([0, *(10.0**e for e in range(0, 13) if min(positive) <= 10.0**e <= max(positive))])
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.minorticks_off()
    return True


def _number_points(axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Write the label of each point beside it, with a line to the point where there is no room close by."""
    points_per_pixel = 72 / axes.figure.dpi
    at = (axes.transData.transform([(x, y) for _, x, y in points]) * points_per_pixel).tolist()
    left, bottom, right, top = (edge * points_per_pixel for edge in axes.bbox.extents)
    sizes = [(5.5 * len(label) + 1, 9.0) for label, *_ in points]
    for (label, x, y), (px, py), (lx, ly) in zip(
        points, at, label_places(at, sizes, (left, bottom, right, top)), strict=True
    ):
        line = {"arrowstyle": "-", "color": BASELINE, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 2}
        axes.annotate(
            label,
            (x, y),
            xytext=(lx - px, ly - py),
            textcoords="offset points",
            fontsize=9,
            ha="center",
            va="center",
            arrowprops=line if np.hypot(lx - px, ly - py) > 12 else None,
        )


Curves = dict[str, list[tuple[float, Row]]]  # name of a method -> (value of the option, the row that has it)


def varied_figures(plan: Plan, table: CollectionTable) -> list[Markup]:
    """Draw quality against each option that was varied over numbers, with one curve for each method."""
    of_option: dict[str, Curves] = {}
    for row in table.rows:
        if row.method.varied and (value := _number(row.method.varied.value)) is not None:
            curves = of_option.setdefault(row.method.varied.option, {})
            curves.setdefault(row.method.varied.name, []).append((value, row))
    rows = {row.name: row for row in table.rows}
    figures = []
    for option, curves in of_option.items():
        for name, points in curves.items():
            value = _value_of(plan, rows[name], option) if name in rows else None
            if value is not None and value not in (x for x, _ in points):  # the method itself, as the plan has it
                points.append((value, rows[name]))
            points.sort(key=lambda point: point[0])
        label = f"{table.measures[0]} against {option} on {table.collection}"
        figures.append(draw_svg(partial(_draw_varied, table=table, option=option, curves=curves), (9, 3.2), label))
    return figures


def _draw_varied(figure: Figure, table: CollectionTable, option: str, curves: Curves) -> None:
    axes, measure = figure.subplots(), table.measures[0]
    for (name, points), color in zip(curves.items(), _LINES * len(curves), strict=False):
        axes.errorbar(
            [x for x, _ in points],
            [row.means[measure] for _, row in points],
            [row.deviations.get(measure, 0.0) for _, row in points],
            color=color,
            marker="o",
            markersize=4,
            capsize=3,
            linewidth=1.4,
            label=plain(name),
        )
    means = {row.name: row.means[measure] for row in table.rows}
    for kind, base in table.baselines.items():
        style = "--" if kind == UPR else ":"
        axes.axhline(means[base], color=INK, linewidth=0.9, linestyle=style, label=plain(base))
    values = sorted({x for points in curves.values() for x, _ in points})
    if option == "queries" or (values[0] > 0 and values[-1] / values[0] >= 16):
        axes.set_xscale("log")
    axes.set_xticks(values, [f"{x:g}" for x in values])
    axes.minorticks_off()
    axes.set_xlabel("training queries" if option == "queries" else option)
    axes.set_ylabel(f"{measure}, ± deviation over seeds")
    legend = axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for text in legend.get_texts():
        text.set_color(INK)


def _value_of(plan: Plan, row: Row, option: str) -> float | None:
    """Return the option of a method that does not vary it; None if it is no number."""
    method = row.method
    values = vars(plan.config(method, plan.seeds[0])) | vars(method.training) | {"learning_rate": method.learning_rate}
    return _number(values.get(option))


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
