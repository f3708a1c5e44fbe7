"""Reports of a comparison, as one HTML file and on the terminal: table, plots, and examples with their clues marked.

A `Report` has plain values; the functions here show it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..utils.files import AnyPath, write_text
from ..utils.words import counted
from .comparison import ComparisonTable
from .html_page import render_page
from .plots import INK, LOSS, SYSTEM, draw_means, draw_svg, plain
from .significance import format_p

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Group, RenderableType
    from rich.text import Text

_TERMINAL_CHARACTERS = 700  # of an example's document
_MARKED_FROM = 0.05  # shade from which a clue is marked
_TITLE_CHARACTERS = 36  # of a line above the narrower plot


@dataclass
class Clue:
    """Characters ``start`` to ``end`` of an example's text, and their weight (on any scale; larger weighs more)."""

    start: int
    end: int
    weight: float


@dataclass
class Example:
    """One document that was ranked for one query.

    Attributes:
        query, doc_id, text: the query, and the document's id and text.
        clues: marked spans of ``text``; `Explanation.clues` can be given as they are.
        rank_before, rank_after: ranks in the first stage and after reranking, from 1; None: not among the candidates.
        relevant: the judgement; None if there is none.
        method: name of the system that the clues come from.
        note: a sentence about the example.
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
    """Everything that a report shows.

    Attributes:
        title: the heading.
        lead: what was done, in a sentence or two.
        setting: facts by name, in order: versions, packages, sizes, seed.
        table: result of `compare_table`.
        measure: the measure that is plotted.
        per_query: system -> query_id -> value of ``measure`` (`Evaluation.per_query`), for the systems of ``table``.
        seconds_per_query: system -> wall time; systems may be missing.
        examples: documents with their clues.
        notes: sentences below the table.
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
    """Write the page of `html`; a write that fails leaves no file. Raises: ImportError without matplotlib."""
    write_text(path, html(report))


def html(report: Report) -> str:
    """Return the report as one HTML page. Raises: ImportError without matplotlib."""
    table = report.table
    return render_page(
        Path(__file__).with_name("report.html"),
        title=report.title,
        lead=report.lead,
        table=table,
        best={measure: max(system.values[measure] for system in table.systems) for measure in table.measures},
        times=_times(report),
        notes=[*table.notes(), *report.notes],
        plot=plot(report),
        examples=report.examples,
        setting=report.setting.items(),
        format_p=format_p,
        facts=_facts,
        segments=segments,
        marked_from=_MARKED_FROM,
    )


def render(report: Report) -> Group:
    """Return the report for a terminal, which rich prints."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(report.title, style="bold"), Text(report.lead), Text()]
    parts.append(report.table.render(_times(report)))
    parts += [Text(note) for note in report.notes]
    for number, example in enumerate(report.examples, start=1):
        parts += [Text(), Text(f"Example {number}: {example.query}", style="bold"), Text(_facts(example), style="dim")]
        if example.note:
            parts.append(Text(example.note))
        parts += [_marked_text(example), Text("clues: " + _clue_list(example), style="dim")]
    return Group(*parts)


def plot(report: Report) -> Markup:
    """Draw two panels as SVG: the mean of every system with its interval, and the differences query by query."""

    def draw(figure: Figure) -> None:
        means, differences = figure.subplots(1, 2, width_ratios=(3, 2))
        values = {name: list(of_queries.values()) for name, of_queries in report.per_query.items()}
        count = len(next(iter(values.values())))
        label = f"{report.measure}: mean of {counted(count, 'queries')}, 95 % interval"
        draw_means(means, values, [report.table.baseline], label)
        _plot_differences(differences, report)

    label = f"Left: mean {report.measure} of each system. Right: difference to {report.table.baseline} for each query."
    return draw_svg(draw, (9, max(2.8, 1.2 + 0.38 * len(report.per_query))), label)


def segments(text: str, clues: list[Clue]) -> Iterator[tuple[str, float, float]]:
    """Cut a text where its marking changes.

    Where clues overlap, the heavier one counts; what lies outside the text is ignored.

    Yields: (piece, shade, weight); shade 0 is no clue, 1 the heaviest clue of this text.
    """
    weights = [0.0] * len(text)
    for clue in clues:
        for i in range(max(0, clue.start), min(len(text), clue.end)):
            weights[i] = max(weights[i], clue.weight)
    heaviest = max(weights, default=0.0)
    start = 0
    for weight, run in groupby(weights):
        length = len(list(run))
        yield text[start : start + length], weight / heaviest if heaviest > 0 else 0.0, weight
        start += length


def _facts(example: Example) -> str:
    """Return the line below an example's query."""

    def rank(number: int | None) -> str:
        return "not a candidate" if number is None else f"rank {number}"

    judged = {True: ", relevant", False: ", not relevant", None: ""}[example.relevant]
    method = f"; clues of {example.method}" if example.method else ""
    before, after = rank(example.rank_before), rank(example.rank_after)
    return f"document {example.doc_id}{judged}: {before} before, {after} after{method}"


def _plot_differences(axes: Axes, report: Report) -> None:
    """Draw the sorted differences of the best system to the baseline; they show how many queries gain or lose."""
    base = report.per_query[report.table.baseline]
    others = [name for name in report.per_query if name != report.table.baseline]
    if not others:
        axes.set_axis_off()
        return
    best = max(others, key=lambda name: float(np.mean(list(report.per_query[name].values()))))
    differences = np.array(sorted((report.per_query[best][q] - base[q] for q in base), reverse=True))
    axes.bar(range(len(differences)), differences, width=1.0, color=[SYSTEM if d > 0 else LOSS for d in differences])
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xlabel("queries, largest gain first")
    axes.set_ylabel(f"difference in {report.measure}")
    counts = [int(which.sum()) for which in (differences > 0, differences == 0, differences < 0)]
    names = [textwrap.fill(name, _TITLE_CHARACTERS) for name in (best, f"against {report.table.baseline}")]
    title = [*map(plain, names), "{} gain, {} equal, {} lose".format(*counts)]
    axes.set_title("\n".join(title), loc="right", fontsize=10, color=INK)  # room is on its left, above the other plot


def _seconds(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _times(report: Report) -> dict[str, str] | None:
    if not report.seconds_per_query:
        return None
    return {name: _seconds(seconds) for name, seconds in report.seconds_per_query.items()}


def _marked_text(example: Example) -> Text:
    from rich.text import Text

    text = Text()
    for piece, shade, _ in segments(example.text, example.clues):
        yellow = f"rgb(255,{235 - int(80 * shade)},{200 - int(170 * shade)})"
        text.append(piece, style=f"black on {yellow}" if shade >= _MARKED_FROM else "")  # on any background
    if len(text) > _TERMINAL_CHARACTERS:
        text.truncate(_TERMINAL_CHARACTERS, overflow="ellipsis")
    return text


def _clue_list(example: Example, count: int = 10) -> str:
    """List the heaviest clues; a token that occurs several times is listed once, with its largest weight."""
    weights: dict[str, float] = {}
    for clue in sorted(example.clues, key=lambda clue: (-clue.weight, clue.start)):
        weights.setdefault(example.text[clue.start : clue.end].strip(), clue.weight)
    return ", ".join(f"{token!r} {weight:.2g}" for token, weight in list(weights.items())[:count]) or "none"
