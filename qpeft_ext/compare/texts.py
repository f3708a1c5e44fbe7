"""The tables of a comparison as Markdown, JSON and CSV, and for a terminal."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .plan import Plan
from .sections import Section, Value, describe_methods, quality, sections
from .tables import AGAINST, COSTS, CollectionTable

if TYPE_CHECKING:
    from rich.console import Group, RenderableType


def markdown(plan: Plan, tables: Sequence[CollectionTable]) -> str:
    """Return all tables and what the methods are, as Markdown."""
    lines = [f"# {plan.title or 'Comparison'}", ""]
    for table in tables:
        lines += [f"## {table.collection}", ""]
        for section in sections(table):
            lines += _markdown_section(section)
    lines += ["## Methods", "", *(f"- **{name}**: {about}" for name, about in describe_methods(plan)), ""]
    return "\n".join(lines)


def _markdown_section(section: Section) -> list[str]:
    def value(value: Value) -> str:
        return (f"**{value.with_detail}**" if value.best else value.with_detail) + value.marks

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    lines = [
        f"### {section.heading}",
        "",
        line(section.columns),
        f"|{'|'.join(['---', *['---:'] * (len(section.columns) - 1)])}|",
    ]
    for name, values in section.rows:
        lines.append(line([name, *map(value, values)]))
    return [*lines, "", *(f"{note}  " for note in section.notes), ""]


def render(tables: Sequence[CollectionTable]) -> Group:
    """Return the tables of quality, without those of differences and cost, for rich to print."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = []
    for table in tables:
        section = quality(table)
        shown = Table(title=table.collection, title_justify="left", pad_edge=False)
        shown.add_column(section.columns[0])
        for column in section.columns[1:]:
            shown.add_column(column.replace("Recall", " Recall"), justify="right")
        for name, values in section.rows:
            cells = [Text(value.with_detail + value.marks, style="bold" if value.best else "") for value in values]
            shown.add_row(Text(name), *cells)
        parts += [shown, *map(Text, section.notes), Text()]
    return Group(*parts)


def json_text(tables: Sequence[CollectionTable]) -> str:
    """Return the rows with unrounded numbers, and each result without its values per query, as JSON.

    A result has its settings, facts, versions, commit and machine. A mean over no query and a p-value of fewer than two
    are null.
    """

    def numbers(values: Mapping[str, float]) -> dict[str, float | None]:
        return {name: None if value != value else value for name, value in values.items()}

    content = []
    for table in tables:
        rows = [
            {
                "method": row.name,
                "seeds": row.seeds,
                "means": numbers(row.means),
                "deviations": numbers(row.deviations),
                "against": {
                    kind: {name: numbers(values) for name, values in vars(against).items()}
                    for kind, against in row.against.items()
                },
                "cost": row.cost,
            }
            for row in table.rows
        ]
        results = [{name: value for name, value in result.items() if name != "per_query"} for result in table.results]
        content.append({"collection": table.collection, "queries": table.num_queries, "rows": rows, "results": results})
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def csv_text(tables: Sequence[CollectionTable]) -> str:
    """Return one line for each collection and method, with unrounded numbers, as CSV."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    head = ["collection", "method", "seeds"]
    for measure in tables[0].measures:
        head += [measure, f"{measure} deviation", f"{measure} queries"]
        head += [f"{measure} {what} {kind}" for kind in AGAINST for what in ("difference to", "p against")]
    writer.writerow([*head, *COSTS])
    for table in tables:
        for row in table.rows:
            line: list[Any] = [table.collection, row.name, row.seeds]
            for measure in table.measures:
                line += [row.means[measure], row.deviations.get(measure), table.num_queries[measure]]
                for kind in AGAINST:
                    against = row.against.get(kind)
                    line += [against and against.difference[measure], against and against.p_holm[measure]]
            writer.writerow([*line, *(row.cost[name] for name in COSTS)])
    return file.getvalue()
