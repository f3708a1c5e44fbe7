"""The comparison as one HTML page: the tables of `tables`, with plots of quality, of cost, and of varied options."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

import numpy as np

from ..evaluation.html_page import INK, draw_svg, page, plain
from ..evaluation.report import mean_interval
from .label_places import label_places
from .plan import Plan
from .tables import COSTS, CollectionTable, Row, describe_methods, sections

_BASELINE, _METHOD = "#8a93a0", "#3f7fd0"
_LINES = ("#3f7fd0", "#d0673f", "#3a9d6e", "#9b6bd0", "#b8902a", "#c2557f", "#4a9fb8")
_AGAINST_COST = ("documents_per_second", "queries_per_petaflop", "trainable")


def html(plan: Plan, tables: Sequence[CollectionTable]) -> str:
    """The whole page. Raises: ImportError without matplotlib."""
    title = plan.title or "Comparison"
    body = [f"<h1>{escape(title)}</h1>\n<p class=lead>{escape(_lead(plan, tables))}</p>"]
    for table in tables:
        body.append(f"<h2>{escape(table.collection)}</h2>")
        quality, *others = sections(table)
        body.append(_section(*quality))
        body.append(f"<figure>{_draw_means(table)}</figure>")
        body += [_section(*other) for other in others]
        if figure := _draw_costs(table):
            body.append(f"<figure>{figure}</figure>")
        body += [f"<figure>{figure}</figure>" for figure in _draw_varied(plan, table)]
    body.append("<h2>Methods</h2>\n" + _rows(describe_methods(plan)))
    body.append("<h2>Setting</h2>\n" + _rows(_setting(plan, tables)))
    return page(title, "\n".join(body))


def _lead(plan: Plan, tables: Sequence[CollectionTable]) -> str:
    seeds = f"{len(plan.seeds)} seeds" if len(plan.seeds) > 1 else "one seed"
    return (
        f"{len(plan.methods)} methods on {len(tables)} collection{'s' * (len(tables) > 1)}, {seeds} for what is "
        "trained. All rerank the same candidates of the same first stage with the same LM, prompt and truncation."
    )


def _rows(pairs: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<tr><th scope=row>{escape(name)}</th><td>{escape(value)}</td></tr>\n" for name, value in pairs)
    return f"<div class=wide><table class=setting>\n{rows}</table></div>"


def _setting(plan: Plan, tables: Sequence[CollectionTable]) -> list[tuple[str, str]]:
    results = [result for table in tables for result in table.results]
    pairs = [
        ("language model", f"{plan.lm}{f', {plan.dtype}' if plan.dtype else ''}"),
        ("options of all methods", ", ".join(f"{k} {v}" for k, v in plan.options.items()) or "the defaults"),
        ("seeds", ", ".join(map(str, plan.seeds))),
    ]
    for name, collection in plan.collections.items():
        parts = [
            f"{collection.data}, split {collection.split or 'by default'}, {collection.candidates} candidates of "
            f"{collection.run or 'BM25'}"
        ]
        for what in ("train", "synthetic", "dev"):
            part = getattr(collection, what)
            parts += [f"{what}: {part.examples or f'{part.data}, split {part.split}'}"] if part else []
        pairs.append((name, "; ".join(parts)))
    for key in ("commit", "date"):
        pairs.append((key, ", ".join(sorted({str(result.get(key) or "unknown") for result in results}))))
    for key in ("versions", "machine"):
        texts = sorted({", ".join(f"{k} {v}" for k, v in result.get(key, {}).items()) for result in results})
        pairs.append((key, "; or ".join(texts)))
    return pairs


# -- tables ----------------------------------------------------------------------------------------------------------


def _section(heading: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    head = "".join(f"<th scope=col>{escape(column).replace('Recall', '<wbr>Recall')}</th>" for column in columns)
    body = "\n".join(
        f"<tr><th scope=row>{escape(name)}</th>{''.join(f'<td>{_cell(c)}</td>' for c in cells)}</tr>"
        for name, *cells in rows
    )
    below = "".join(f"<p class=note>{escape(note)}</p>\n" for note in notes)
    return (
        f"<h3 class=part>{escape(heading)}</h3>\n<div class=wide><table class=measures>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>\n{below}"
    )


def _cell(text: str) -> str:
    """A cell of `sections`; the best value is between asterisks, a deviation or p-value stands in small below."""
    value = escape(text)
    value = re.sub(r"\*\*(.*)\*\*", r"<b>\1</b>", value)
    value = re.sub(r" (± [0-9.]+)(</b>)?(.*)$", r"\2\3<small>\1</small>", value)
    return re.sub(r" \((p.*)\)$", r"<small>\1</small>", value)


# -- plots -----------------------------------------------------------------------------------------------------------


def _draw_means(table: CollectionTable) -> str:
    measure, rows = table.measures[0], table.rows
    values = [list(row.per_query[measure].values()) for row in rows]

    def draw(figure) -> None:
        axes = figure.subplots()
        means = [row.means[measure] for row in rows]
        bounds = [mean_interval(v) for v in values]
        errors = [
            [m - low for m, (low, _) in zip(means, bounds, strict=True)],
            [high - m for m, (_, high) in zip(means, bounds, strict=True)],
        ]
        colors = [_BASELINE if row.name in table.baselines.values() else _METHOD for row in rows]
        axes.barh(
            range(len(rows)),
            means,
            xerr=np.maximum(errors, 0),
            color=colors,
            height=0.62,
            error_kw={"ecolor": INK, "capsize": 3, "elinewidth": 1},
        )
        for place, (mean, (_, high)) in enumerate(zip(means, bounds, strict=True)):
            axes.annotate(
                f"{mean:.3f}", (high, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9
            )
        axes.set_yticks(range(len(rows)), [plain(name) for name in _numbered(rows)])
        axes.invert_yaxis()
        axes.set_xlim(0, max(high for _, high in bounds) * 1.12 + 1e-6)
        axes.set_xlabel(f"{measure}: mean of {len(values[0])} queries, 95 % interval over queries (bootstrap)")

    return draw_svg(draw, (9, max(2.0, 1.0 + 0.34 * len(rows))), f"Mean {measure} of each method on {table.collection}")


def _draw_costs(table: CollectionTable) -> str:
    """Quality against cost, one panel for each cost that any method has; methods by their numbers in the tables."""
    measure = table.measures[0]
    panels = [name for name in _AGAINST_COST if any(row.cost[name] for row in table.rows)]
    if not panels:
        return ""

    def draw(figure) -> None:
        drawn = []
        floor = 0.5 * float(np.median([row.means[measure] for row in table.rows]))  # below: at the edge of the plot
        for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            points = [
                (number, row.cost[name], row.means[measure])
                for number, row in enumerate(table.rows, start=1)
                if row.cost[name] is not None
            ]
            log = _use_log_scale(axes, [x for _, x, _ in points])
            inside, far = ([p for p in points if (p[2] < floor) == low] for low in (False, True))
            axes.scatter([x for _, x, _ in inside], [y for *_, y in inside], s=22, color=_METHOD, zorder=3)
            axes.margins(x=0.12, y=0.12)
            bottom = axes.get_ylim()[0]
            axes.scatter(
                [x for _, x, _ in far], [bottom] * len(far), s=22, color=_METHOD, zorder=3, marker="v", clip_on=False
            )
            axes.set_ylim(bottom=bottom)
            points = [(str(number), x, y) for number, x, y in inside]
            points += [(f"{number} ({y:.2f})", x, bottom) for number, x, y in far]
            axes.set_xlabel(COSTS[name][0] + (", logarithmic" if log else ""), fontsize=9)
            axes.tick_params(labelsize=8)
            axes.grid(True, color=_BASELINE, alpha=0.25, linewidth=0.6)
            drawn.append((axes, points))
        figure.axes[0].set_ylabel(measure)
        figure.draw_without_rendering()  # settles the layout, on which places of the numbers depend
        for axes, points in drawn:
            _number_points(axes, points)

    label = f"{measure} against {', '.join(COSTS[name][0] for name in panels)}, on {table.collection}"
    return draw_svg(draw, (3.3 * max(2, len(panels)), 3.6), label)


def _use_log_scale(axes, values: Sequence[float]) -> bool:
    """A logarithmic axis where the values span more than a factor of 5, with 0 at its left end if it occurs."""
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


def _number_points(axes, points: Sequence[tuple[str, float, float]]) -> None:
    """The label of each point beside it, with a line to it where it stands farther away."""
    points_per_pixel = 72 / axes.figure.dpi
    at = axes.transData.transform([(x, y) for _, x, y in points]) * points_per_pixel
    left, bottom, right, top = axes.bbox.extents * points_per_pixel
    sizes = [(5.5 * len(label) + 1, 9.0) for label, *_ in points]
    for (label, x, y), (px, py), (lx, ly) in zip(
        points, at, label_places(at, sizes, (left, bottom, right, top)), strict=True
    ):
        line = {"arrowstyle": "-", "color": _BASELINE, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 2}
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


def _draw_varied(plan: Plan, table: CollectionTable) -> list[str]:
    """A curve for every option that was varied over numbers (learning curves among them), methods together."""
    measure, rows = table.measures[0], {row.name: row for row in table.rows}
    curves: dict[str, dict[str, list[tuple[float, Row]]]] = {}
    for row in table.rows:
        name, option, value = row.method.varied or ("", "", None)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            curves.setdefault(option, {}).setdefault(name, []).append((float(value), row))
    figures = []
    for option, lines in curves.items():
        for name, points in lines.items():  # the method that was varied is a point of its curve
            if name in rows and (value := _value_of(plan, rows[name], option)) not in (None, *(x for x, _ in points)):
                points.append((value, rows[name]))
            points.sort(key=lambda point: point[0])

        def draw(figure, option=option, lines=lines) -> None:
            axes = figure.subplots()
            for (name, points), color in zip(lines.items(), _LINES * len(lines), strict=False):
                xs = [x for x, _ in points]
                axes.errorbar(
                    xs,
                    [row.means[measure] for _, row in points],
                    [row.deviations.get(measure, 0.0) for _, row in points],
                    color=color,
                    marker="o",
                    markersize=4,
                    capsize=3,
                    linewidth=1.4,
                    label=plain(name),
                )
            for kind, base in table.baselines.items():
                style = "--" if kind == "upr" else ":"
                axes.axhline(rows[base].means[measure], color=INK, linewidth=0.9, linestyle=style, label=plain(base))
            values = sorted({x for points in lines.values() for x, _ in points})
            if option == "queries" or (values[0] > 0 and values[-1] / values[0] >= 16):
                axes.set_xscale("log")
            axes.set_xticks(values, [f"{x:g}" for x in values])
            axes.minorticks_off()
            axes.set_xlabel("training queries" if option == "queries" else option)
            axes.set_ylabel(f"{measure}, ± deviation over seeds")
            legend = axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
            for text in legend.get_texts():
                text.set_color(INK)

        figures.append(draw_svg(draw, (9, 3.2), f"{measure} against {option} on {table.collection}"))
    return figures


def _value_of(plan: Plan, row: Row, option: str) -> float | None:
    """What an option is for a method that does not vary it."""
    method = row.method
    values = vars(plan.config(method, plan.seeds[0])) | vars(method.training) | {"learning_rate": method.learning_rate}
    value = values.get(option)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _numbered(rows: Sequence[Row]) -> list[str]:
    return [f"{number}. {row.name}" for number, row in enumerate(rows, start=1)]
