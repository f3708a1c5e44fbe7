"""A comparison of systems as one HTML file and on the terminal: table, plot, and examples with their clues marked.

Everything is a function of a `Report`, which holds plain values. The HTML needs no script and no other file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from itertools import groupby

import numpy as np

from ..utils.files import AnyPath, write_text
from .comparison import ComparisonTable, System
from .html_page import INK, draw_svg, page, plain
from .significance import format_p

_TERMINAL_CHARACTERS = 700


@dataclass
class Clue:
    """Characters ``start``..``end`` of an example's text, and how much they count (any scale, larger is more)."""

    start: int
    end: int
    weight: float


@dataclass
class Example:
    """One document for one query. `Explanation.clues` can be given as ``clues``.

    rank_before, rank_after: 1 is best; None: not among the candidates.  relevant: None if it is not judged.
    method: which system's clues these are.  note: a sentence about the example.
    """

    query: str
    doc_id: str
    text: str
    clues: list[Clue]
    rank_before: int | None
    rank_after: int | None
    relevant: bool | None = None
    method: str = ""
    note: str = ""


@dataclass
class Report:
    """All that a report shows.

    lead: what was done, in a sentence or two.  setting: name -> value, in order (versions, packages, sizes, seed).
    table: from `evaluate.compare_table`.  measure: the one that is plotted.
    per_query: system -> query_id -> value of ``measure`` (`Evaluation.per_query`); same systems as the table.
    seconds_per_query: system -> wall time; may lack systems.  notes: sentences under the table.
    """

    title: str
    lead: str
    setting: dict[str, str]
    table: ComparisonTable
    measure: str
    per_query: dict[str, dict[str, float]]
    seconds_per_query: dict[str, float] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def write_html(report: Report, path: AnyPath) -> None:
    """Write `html`, as a whole or not at all."""
    write_text(path, html(report))


def html(report: Report) -> str:
    """The report as one HTML page. Raises: ImportError without matplotlib."""
    parts = [
        f"<h1>{escape(report.title)}</h1>\n<p class=lead>{escape(report.lead)}</p>",
        f"<h2>Quality</h2>\n{_html_table(report)}",
        "".join(f"<p class=note>{escape(note)}</p>\n" for note in [*report.table.notes(), *report.notes]),
        f"<figure>{plot(report)}</figure>",
    ]
    if report.examples:
        parts += ["<h2>Examples</h2>\n<p>The darker a clue is marked, the more it weighs in its document.</p>"]
        parts += [_html_example(example) for example in report.examples]
    rows = "".join(
        f"<tr><th scope=row>{escape(name)}</th><td>{escape(value)}</td></tr>\n"
        for name, value in report.setting.items()
    )
    parts += [f"<h2>Setting</h2>\n<div class=wide><table class=setting>\n{rows}</table></div>"]
    return page(report.title, "\n".join(parts))


def render(report: Report):
    """The report for a terminal: something that rich prints."""
    from rich.console import Group
    from rich.text import Text

    parts = [Text(report.title, style="bold"), Text(report.lead), Text(), report.table.render(_times(report))]
    parts += [Text(note) for note in report.notes]
    for number, example in enumerate(report.examples, start=1):
        parts += [Text(), Text(f"Example {number}: {example.query}", style="bold"), Text(_facts(example), style="dim")]
        if example.note:
            parts.append(Text(example.note))
        parts += [_marked_text(example), Text("clues: " + _clue_list(example), style="dim")]
    return Group(*parts)


def plot(report: Report) -> str:
    """SVG of two panels: the mean of every system with its interval, and the differences query by query."""

    def draw(figure) -> None:
        means, differences = figure.subplots(1, 2, width_ratios=(3, 2))
        _plot_means(means, report)
        _plot_differences(differences, report)

    label = f"Left: mean {report.measure} of each system. Right: difference to {report.table.baseline} for each query."
    return draw_svg(draw, (9, max(2.8, 1.2 + 0.38 * len(report.per_query))), label)


def mean_interval(values: list[float], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of a mean: 2,000 resamples of the queries, seeded."""
    data = np.asarray(values)
    draws = np.random.default_rng(seed).integers(0, len(data), (2000, len(data)))
    low, high = np.percentile(data[draws].mean(axis=1), (2.5, 97.5))
    return float(low), float(high)


def segments(text: str, clues: list[Clue]) -> Iterator[tuple[str, float, float]]:
    """The text in pieces: (piece, shade in [0, 1], weight). Shade 0 is no clue, 1 the heaviest clue of this text.

    Where clues overlap the heavier one shows; places outside the text are ignored.
    """
    weights = [0.0] * len(text)
    for clue in clues:
        for place in range(max(0, clue.start), min(len(text), clue.end)):
            weights[place] = max(weights[place], clue.weight)
    heaviest = max(weights, default=0.0)
    start = 0
    for weight, run in groupby(weights):
        length = len(list(run))
        yield text[start : start + length], weight / heaviest if heaviest > 0 else 0.0, weight
        start += length


# -- parts of the page ---------------------------------------------------------------------------------------------


def _html_table(report: Report) -> str:
    measures, times = report.table.measures, report.seconds_per_query
    head = "".join(f"<th scope=col>{escape(measure)}</th>" for measure in measures)
    head += "<th scope=col>s per query</th>" if times else ""
    best = {measure: max(system.values[measure] for system in report.table.systems) for measure in measures}
    rows = []
    for system in report.table.systems:
        cells = "".join(_html_cell(system, measure, best[measure]) for measure in measures)
        if times:
            cells += f"<td>{_seconds(times[system.name]) if system.name in times else '–'}</td>"
        rows.append(f"<tr><th scope=row>{escape(system.name)}</th>{cells}</tr>")
    head = f"<thead><tr><th scope=col>system</th>{head}</tr></thead>"
    body = "\n".join(rows)
    return f"<div class=wide><table class=measures>\n{head}\n<tbody>\n{body}\n</tbody></table></div>"


def _html_cell(system: System, measure: str, best: float) -> str:
    value = f"{system.values[measure]:.4f}"
    value = f"<b>{value}</b>" if system.values[measure] == best else value
    if not system.difference:
        return f"<td>{value}<small>baseline</small></td>"
    p = escape(format_p(system.p_holm[measure]))
    return f"<td>{value}<small>{system.difference[measure]:+.4f}<br>{p}</small></td>"


def _html_example(example: Example) -> str:
    text = "".join(
        f'<mark style="--w:{0.15 + 0.85 * shade:.2f}" title="weight {weight:.4g}">{escape(piece)}</mark>'
        if shade >= 0.05
        else escape(piece)
        for piece, shade, weight in segments(example.text, example.clues)
    )
    note = f"<p>{escape(example.note)}</p>\n" if example.note else ""
    return (
        f"<section>\n<h3>{escape(example.query)}</h3>\n<p class=note>{escape(_facts(example))}</p>\n{note}"
        f"<div class=document>{text}</div>\n</section>"
    )


def _facts(example: Example) -> str:
    def rank(number: int | None) -> str:
        return "not a candidate" if number is None else f"rank {number}"

    judged = {True: ", relevant", False: ", not relevant", None: ""}[example.relevant]
    method = f"; clues of {example.method}" if example.method else ""
    before, after = rank(example.rank_before), rank(example.rank_after)
    return f"document {example.doc_id}{judged}: {before} before, {after} after{method}"


def _plot_means(axes, report: Report) -> None:
    names = list(report.per_query)
    values = [list(report.per_query[name].values()) for name in names]
    means = [float(np.mean(v)) for v in values]
    bounds = [mean_interval(v) for v in values]
    errors = [
        [m - low for m, (low, _) in zip(means, bounds, strict=True)],
        [high - m for m, (_, high) in zip(means, bounds, strict=True)],
    ]
    colors = ["#8a93a0" if name == report.table.baseline else "#3f7fd0" for name in names]
    axes.barh(
        range(len(names)),
        means,
        xerr=np.maximum(errors, 0),
        color=colors,
        height=0.62,
        error_kw={"ecolor": INK, "capsize": 3, "elinewidth": 1},
    )
    for place, (mean, (_, high)) in enumerate(zip(means, bounds, strict=True)):
        axes.annotate(f"{mean:.3f}", (high, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(names)), [plain(name) for name in names])
    axes.invert_yaxis()
    axes.set_xlim(0, max(high for _, high in bounds) * 1.15 + 1e-6)
    axes.set_xlabel(f"{report.measure}: mean of {len(values[0])} queries, 95 % interval")


def _plot_differences(axes, report: Report) -> None:
    """Differences of the best system to the baseline, sorted: how many queries gain, how many lose."""
    base = report.per_query[report.table.baseline]
    others = [name for name in report.per_query if name != report.table.baseline]
    if not others:
        axes.set_axis_off()
        return
    best = max(others, key=lambda name: float(np.mean(list(report.per_query[name].values()))))
    differences = np.array(sorted((report.per_query[best][q] - base[q] for q in base), reverse=True))
    axes.bar(
        range(len(differences)), differences, width=1.0, color=["#3f7fd0" if d > 0 else "#d0673f" for d in differences]
    )
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xlabel("queries, largest gain first")
    axes.set_ylabel(f"difference in {report.measure}")
    counts = [int(which.sum()) for which in (differences > 0, differences == 0, differences < 0)]
    axes.set_title(
        plain(f"{best}\nagainst {report.table.baseline}") + "\n{} gain, {} equal, {} lose".format(*counts),
        fontsize=10,
        color=INK,
    )


def _seconds(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


# -- parts of the terminal output ----------------------------------------------------------------------------------


def _times(report: Report) -> dict[str, str] | None:
    if not report.seconds_per_query:
        return None
    return {name: _seconds(seconds) for name, seconds in report.seconds_per_query.items()}


def _marked_text(example: Example):
    from rich.text import Text

    text = Text()
    for piece, shade, _ in segments(example.text, example.clues):
        # yellow on any background, dark ink on it
        text.append(
            piece, style=f"black on rgb(255,{235 - int(80 * shade)},{200 - int(170 * shade)})" if shade >= 0.05 else ""
        )
    if len(text) > _TERMINAL_CHARACTERS:
        text.truncate(_TERMINAL_CHARACTERS, overflow="ellipsis")
    return text


def _clue_list(example: Example, count: int = 10) -> str:
    """The heaviest clues; a token that stands in several places is one of them, with its largest weight."""
    weights: dict[str, float] = {}
    for clue in sorted(example.clues, key=lambda clue: (-clue.weight, clue.start)):
        weights.setdefault(example.text[clue.start : clue.end].strip(), clue.weight)
    return ", ".join(f"{token!r} {weight:.2g}" for token, weight in list(weights.items())[:count]) or "none"
