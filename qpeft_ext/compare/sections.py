"""Contents of the tables of a comparison, in whatever form they are written: headings, columns, values and notes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..evaluation.significance import format_p
from .notes import MARKS, SIGNIFICANT, cost_notes, quality_notes
from .plan import Plan
from .tables import COSTS, CollectionTable, Row


@dataclass(frozen=True)
class Value:
    """One value of a table.

    Attributes:
        text: the number.
        detail: what belongs to it: "± 0.0020", or a test of significance in parentheses.
        marks: the marks of the baselines that it differs from.
        best: whether it is the best of its column.
    """

    text: str
    detail: str = ""
    marks: str = ""
    best: bool = False

    @property
    def with_detail(self) -> str:
        """The number and what belongs to it on one line, without marks."""
        return f"{self.text} {self.detail}" if self.detail else self.text


NOTHING = Value("–")


@dataclass(frozen=True)
class Section:
    """A table with its heading.

    Attributes:
        heading: its heading.
        columns: headings of its columns; the first is that of the methods.
        rows: the name of a method, and its values.
        notes: sentences below it.
    """

    heading: str
    columns: list[str]
    rows: list[tuple[str, list[Value]]]
    notes: list[str]


def sections(table: CollectionTable) -> list[Section]:
    """Return the tables of one collection: quality, differences to the baselines where there are any, and cost."""
    return [quality(table), *([_differences(table)] if table.baselines else []), _cost(table)]


def numbered(rows: list[Row]) -> list[str]:
    """Return the names of methods with their numbers, which plots show instead of names."""
    return [f"{number}. {row.name}" for number, row in enumerate(rows, start=1)]


def quality(table: CollectionTable) -> Section:
    """Return the table of means, each with its deviation over seeds and the marks of baselines that it differs from."""
    best = {measure: max(row.means[measure] for row in table.rows) for measure in table.measures}

    def value(row: Row, measure: str) -> Value:
        if math.isnan(row.means[measure]):  # over no query
            return NOTHING
        deviation = f"± {row.deviations[measure]:.4f}" if measure in row.deviations else ""
        marks = "".join(MARKS[kind] for kind, against in row.against.items() if against.p_holm[measure] < SIGNIFICANT)
        is_best = math.isclose(row.means[measure], best[measure], rel_tol=1e-12)  # a mean over seeds is rounded
        return Value(f"{row.means[measure]:.4f}", deviation, marks, is_best)

    rows = [[value(row, measure) for measure in table.measures] for row in table.rows]
    return _section("Quality", list(table.measures), table, rows, quality_notes(table))


def _differences(table: CollectionTable) -> Section:
    shown = table.measures[:2]

    def value(row: Row, kind: str, measure: str) -> Value:
        if kind not in row.against:  # the baseline itself
            return NOTHING
        against = row.against[kind]
        counts = f"{against.gain[measure]}:{against.lose[measure]}"
        return Value(f"{against.difference[measure]:+.4f}", f"({format_p(against.p_holm[measure])}, {counts})")

    columns = [f"{measure} against {name}" for measure in shown for name in table.baselines.values()]
    rows = [[value(row, kind, measure) for measure in shown for kind in table.baselines] for row in table.rows]
    note = (
        "Difference of means, two-sided p-value (Holm-corrected), queries that gain : queries that lose; "
        f"{table.measures[0]} decides."
    )
    return _section(f"Differences in {' and '.join(shown)}", columns, table, rows, [note])


def _cost(table: CollectionTable) -> Section:
    def value(row: Row, name: str) -> Value:
        cost = row.cost[name]
        return NOTHING if cost is None else Value(format(cost, COSTS[name].digits))

    rows = [[value(row, name) for name in COSTS] for row in table.rows]
    return _section("Cost", [cost.heading for cost in COSTS.values()], table, rows, cost_notes(table))


def _section(
    heading: str, columns: list[str], table: CollectionTable, rows: list[list[Value]], notes: list[str]
) -> Section:
    return Section(heading, ["method", *columns], list(zip(numbered(table.rows), rows, strict=True)), notes)


def describe_methods(plan: Plan) -> list[tuple[str, str]]:
    """Return the name of each method, and what it is and what the plan sets for it."""
    found = []
    for name, method in plan.methods.items():
        facts = [method.preset.about]
        facts += [f"of {method.of}"] if method.of else []
        facts += [f"{option} {value}" for option, value in (method.options | method.peft).items()]
        if method.preset.trained:
            training = method.training
            kind = "synthetic queries" if method.examples == "synthetic" else "queries"
            epochs = "1 epoch" if training.epochs == 1 else f"{training.epochs:g} epochs"
            facts.append(
                f"{training.queries} {kind} with {training.negatives} negatives, "
                f"{training.queries_per_step} a step, {epochs}, learning rate {method.learning_rate:g}"
            )
        found.append((name, "; ".join(facts)))
    return found
