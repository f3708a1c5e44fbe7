"""Results → rows: means over queries and seeds, paired tests with Holm's correction, costs; Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..evaluation.significance import format_p, holm, paired_test
from .cells import cells
from .methods import FIRST_STAGE, UPR
from .plan import Method, Plan

SIGNIFICANT = 0.05
AGAINST = (FIRST_STAGE, UPR)  # the baselines, by what they are; a table names them as the plan does
MARKS = {FIRST_STAGE: "†", UPR: "‡"}


@dataclass
class Against:
    """Difference to a baseline, the two-sided p-value of the paired t-test, Holm-corrected, and how many queries gain
    and how many lose; by measure."""

    difference: dict[str, float] = field(default_factory=dict)
    p_holm: dict[str, float] = field(default_factory=dict)
    gain: dict[str, int] = field(default_factory=dict)
    lose: dict[str, int] = field(default_factory=dict)


@dataclass
class Row:
    """A method on a collection.

    per_query: measure -> query_id -> value, mean over the seeds.  means: of these.  deviations: sample standard
    deviation over the seeds' means; {} for one seed.  seeds: how many have a result; of ``expected``.
    against: by baseline (`AGAINST`).  cost: see `COSTS`; None where it does not apply.
    """

    method: Method
    seeds: int
    expected: int
    per_query: dict[str, dict[str, float]] = field(default_factory=dict)
    means: dict[str, float] = field(default_factory=dict)
    deviations: dict[str, float] = field(default_factory=dict)
    against: dict[str, Against] = field(default_factory=dict)
    cost: dict[str, float | None] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.method.name


@dataclass
class CollectionTable:
    """All methods on one collection.  baselines: kind -> name.  num_queries: measure -> queries averaged over."""

    collection: str
    measures: list[str]
    rows: list[Row]
    baselines: dict[str, str]
    num_queries: dict[str, int]
    results: list[dict[str, Any]] = field(repr=False)

    def notes(self) -> list[str]:
        """What a reader must know beside the numbers, one sentence each."""
        lines = ["Mean over queries"]
        if any(row.expected > 1 for row in self.rows):
            lines[0] += " ± standard deviation over the seeds (of methods that are trained)"
        counts = sorted(set(self.num_queries.values()), reverse=True)
        if len(counts) > 1:
            lines[0] += "; queries averaged: " + ", ".join(f"{m} {n}" for m, n in self.num_queries.items())
        else:
            lines[0] += f"; {counts[0] if counts else 0} queries"
        if any(name.startswith("CandidateRecall") for name in self.measures):
            lines.append(
                "CandidateRecall@k, recall as the paper's code counts it: relevant documents among the first "
                "k ÷ those among all candidates, over queries that have one."
            )
        for kind, name in self.baselines.items():
            tested = sum(kind in row.against for row in self.rows)
            lines.append(
                f"{MARKS[kind]} differs from {name}: paired t-test on per-query means over the seeds, "
                f"p < {SIGNIFICANT}, Holm-corrected for {tested} methods."
            )
        lines += [
            f"{row.name}: {row.seeds} of {row.expected} seeds have a result."
            for row in self.rows
            if row.seeds < row.expected
        ]
        short = {
            row.name: n
            for row in self.rows
            for r in self.results
            if r["method"] == row.name
            and (n := r.get("training", {}).get("queries", math.inf)) < row.method.training.queries
        }
        lines += [f"{name}: trained on {n} queries, all that the collection gives." for name, n in short.items()]
        fused = [
            f"{r['method']} (seed {r['seed']}): {', '.join(f'{w:.2f}' for w in r['fusion']['weights'])} on "
            f"{r['fusion']['dev_queries']} dev queries"
            for r in self.results
            if "fusion" in r
        ]
        return lines + ([f"Weights of the method and of the first stage: {'; '.join(fused)}."] if fused else [])


# name in `Row.cost` -> (heading with its unit, where a result has it, digits)
COSTS: dict[str, tuple[str, tuple[str, str], str]] = {
    "trainable": ("trainable parameters", ("parameters", "trainable"), ",.0f"),
    "trainable_percent": ("% of all", ("parameters", "percent"), ".2f"),
    "training_seconds": ("training, s", ("training", "seconds"), ".1f"),
    "training_megabytes": ("training, peak MB", ("training", "megabytes"), ",.0f"),
    "ranking_megabytes": ("ranking, peak MB", ("ranking", "megabytes"), ",.0f"),
    "documents_per_second": ("documents per s", ("ranking", "documents_per_second"), ",.0f"),
    "queries_per_petaflop": ("queries per PetaFLOP", ("ranking", "queries_per_petaflop"), ",.0f"),
}
FROM_INDEX = "prefixes_from_index"  # in a result, of its training and of its ranking
COST_NOTES = (
    "Peak memory is what the work needed beyond what was held before it: on a CPU resident memory of the process "
    "(Linux's high-water mark), on CUDA the allocator's. That of ranking holds the kept document prefixes, up to the "
    "plan's cache_bytes.",
    "Documents per s: wall time of ranking with nothing computed before, reading included. "
    "Queries per PetaFLOP (E2R-FLOPs, arXiv 2507.06223): queries with all their candidates per 10¹⁵ floating-point "
    "operations of the LM, from the tokens that it read; clue modules are not counted.",
)


def cost_notes(table: CollectionTable) -> list[str]:
    """What a reader must know beside the costs; where results come from several machines, which are from which."""
    notes, ranked = list(COST_NOTES), [result for result in table.results if "ranking" in result]
    indexed = [r for r in ranked if r["ranking"].get(FROM_INDEX) or r.get("training", {}).get(FROM_INDEX)]
    if indexed:
        notes.append(f"Read prefixes from an index, so that no times are given: {_named(indexed)}.")
    on: dict[str, list[dict]] = {}
    for result in ranked:
        on.setdefault(_machine(result.get("machine", {})), []).append(result)
    if len(on) > 1:
        notes.append("Times and memory are of several machines, so compare them within one.")
        notes += [f"On {machine}: {_named(results)}." for machine, results in on.items()]
    return notes


def _named(results: Sequence[Mapping[str, Any]]) -> str:
    seeds: dict[str, list[str]] = {}
    for result in results:
        seeds.setdefault(result["method"], []).append(str(result["seed"]))
    return "; ".join(f"{name} (seed {', '.join(of_name)})" for name, of_name in seeds.items())


def _machine(facts: dict[str, str]) -> str:
    """The GPU of `commands.info.machine` or, without one, the processor."""
    gpu = facts.get("cuda", "")
    return gpu.split(", sm_")[0] if ", sm_" in gpu else facts.get("cpu", "an unknown machine").split(";")[0]


def build_tables(plan: Plan, output: Path) -> list[CollectionTable]:
    """Tables of the results that are there. Raises: ValueError if there are none, or they lack a measure."""
    tables = []
    for collection in plan.collections:
        grouped: dict[str, tuple[Method, list[dict | None]]] = {}
        for cell in cells(plan, output):
            if cell.collection == collection:
                grouped.setdefault(cell.method.name, (cell.method, []))[1].append(cell.read())
        order = [name for name in plan.methods if name in grouped]
        order = [name for name in grouped if name not in order] + order  # as the plan has them, the first stage first
        rows = [_row(plan, *grouped[name]) for name in order]
        rows = [row for row in rows if row is not None]
        results = [result for _, found in grouped.values() for result in found if result]
        if rows:
            tables.append(_table(collection, list(plan.measures), rows, results))
    if not tables:
        raise ValueError(f"{output}: there is no result of this plan yet")
    return tables


def _row(plan: Plan, method: Method, found: Sequence[dict | None]) -> Row | None:
    results = [result for result in found if result]
    if not results:
        return None
    for result in results:
        if lacking := set(plan.measures) - set(result["per_query"]):
            raise ValueError(
                f"the result of {method.name!r} has no {sorted(lacking)[0]}; run the comparison without "
                "--table-only, which computes it from the run file"
            )
    row = Row(method, len(results), len(found))
    for measure in plan.measures:
        of_seeds = [result["per_query"][measure] for result in results]
        if any(values.keys() != of_seeds[0].keys() for values in of_seeds):
            raise ValueError(f"the results of {method.name!r} are over different queries; run the comparison again")
        row.per_query[measure] = {q: statistics.fmean(values[q] for values in of_seeds) for q in of_seeds[0]}
        row.means[measure] = _mean(row.per_query[measure].values())
        if len(results) > 1:
            row.deviations[measure] = statistics.stdev([_mean(values.values()) for values in of_seeds])
    facts = [_cost_facts(result) for result in results]
    for name, (_, place, _) in COSTS.items():
        values = [fact[place] for fact in facts if fact.get(place) is not None]
        row.cost[name] = statistics.fmean(values) if values else None
    return row


def _cost_facts(result: Mapping[str, Any]) -> dict[tuple[str, str], float | None]:
    facts = {
        (part, name): value
        for part in ("parameters", "training", "ranking")
        for name, value in result.get(part, {}).items()
    }
    if ("parameters", "all") in facts:
        facts["parameters", "percent"] = 100 * facts["parameters", "trainable"] / facts["parameters", "all"]
    for part in ("training", "ranking"):
        if facts.get((part, "peak_bytes")) is not None:
            facts[part, "megabytes"] = facts[part, "peak_bytes"] / 1e6
        if facts.get((part, FROM_INDEX)):  # not what the method would take by itself
            for name in ("seconds", "documents_per_second", "queries_per_petaflop"):
                facts.pop((part, name), None)
    return facts


def _table(collection: str, measures: list[str], rows: list[Row], results: list[dict]) -> CollectionTable:
    baselines = {}
    for kind in AGAINST:
        base = next((row for row in rows if row.method.method == kind), None)
        if base is None:
            continue
        baselines[kind] = base.name
        others = [row for row in rows if row is not base and not (kind == UPR and row.method.method == FIRST_STAGE)]
        for row in others:
            row.against[kind] = Against()
        for measure in measures:
            # the same queries for all: candidates, and so the queries with a relevant one, are the same
            p_values = [paired_test(row.per_query[measure], base.per_query[measure]) for row in others]
            for row, p in zip(others, holm(p_values), strict=True):
                against, change = row.against[kind], _changes(row.per_query[measure], base.per_query[measure])
                against.difference[measure] = row.means[measure] - base.means[measure]
                against.p_holm[measure] = p
                against.gain[measure] = sum(value > 0 for value in change)
                against.lose[measure] = sum(value < 0 for value in change)
    num_queries = {measure: len(rows[0].per_query[measure]) for measure in measures}
    return CollectionTable(collection, measures, rows, baselines, num_queries, results)


def _changes(values: Mapping[str, float], base: Mapping[str, float]) -> list[float]:
    """Of each query; rounded, since a mean over seeds may miss an equal value by the last bit."""
    return [round(values[query] - base[query], 12) for query in base]


def _mean(values) -> float:
    return statistics.fmean(values) if values else float("nan")


# -- what the forms show ---------------------------------------------------------------------------------------


def quality_cell(row: Row, measure: str) -> tuple[str, str]:
    """The mean with its deviation, and the marks of the baselines that it differs from."""
    text = f"{row.means[measure]:.4f}"
    if measure in row.deviations:
        text += f" ± {row.deviations[measure]:.4f}"
    marks = "".join(MARKS[kind] for kind, against in row.against.items() if against.p_holm[measure] < SIGNIFICANT)
    return text, marks


def difference_cell(row: Row, kind: str, measure: str) -> str:
    """Difference to a baseline with its p-value, and queries that gain : lose; "–" for itself."""
    if kind not in row.against:
        return "–"
    against = row.against[kind]
    counts = f"{against.gain[measure]}:{against.lose[measure]}"
    return f"{against.difference[measure]:+.4f} ({format_p(against.p_holm[measure])}, {counts})"


def cost_cell(row: Row, name: str) -> str:
    value = row.cost[name]
    return "–" if value is None else format(value, COSTS[name][2])


def sections(table: CollectionTable) -> list[tuple[str, list[str], list[list[str]], list[str]]]:
    """(heading, columns, rows, notes) of the three tables of a collection: quality, differences, cost."""
    plotted = table.measures[0]
    best = {m: max(row.means[m] for row in table.rows) for m in table.measures}

    def quality(row: Row, measure: str) -> str:
        text, marks = quality_cell(row, measure)
        return (f"**{text}**" if row.means[measure] == best[measure] else text) + marks

    numbered = [f"{number}. {row.name}" for number, row in enumerate(table.rows, start=1)]
    parts = [
        (
            "Quality",
            ["method", *table.measures],
            [
                [name, *(quality(row, m) for m in table.measures)]
                for name, row in zip(numbered, table.rows, strict=True)
            ],
            table.notes(),
        )
    ]
    if table.baselines:
        heads = [f"{measure} against {name}" for measure in table.measures[:2] for name in table.baselines.values()]
        parts.append(
            (
                f"Differences in {' and '.join(table.measures[:2])}",
                ["method", *heads],
                [
                    [name, *(difference_cell(row, kind, m) for m in table.measures[:2] for kind in table.baselines)]
                    for name, row in zip(numbered, table.rows, strict=True)
                ],
                [
                    "Difference of means, two-sided p-value (Holm-corrected), queries that gain : queries that "
                    f"lose; {plotted} decides."
                ],
            )
        )
    parts.append(
        (
            "Cost",
            ["method", *(heading for heading, _, _ in COSTS.values())],
            [[name, *(cost_cell(row, cost) for cost in COSTS)] for name, row in zip(numbered, table.rows, strict=True)],
            cost_notes(table),
        )
    )
    return parts


def markdown(plan: Plan, tables: Sequence[CollectionTable]) -> str:
    """All tables and what the methods are, as Markdown."""
    lines = [f"# {plan.title or 'Comparison'}", ""]
    for table in tables:
        lines += [f"## {table.collection}", ""]
        for part in sections(table):
            lines += _markdown_section(*part)
    lines += ["## Methods", "", *(f"- **{name}**: {about}" for name, about in describe_methods(plan)), ""]
    return "\n".join(lines)


def _markdown_section(heading: str, columns: list[str], rows: list[list[str]], notes: list[str]) -> list[str]:
    lines = [
        f"### {heading}",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'|'.join(['---', *['---:'] * (len(columns) - 1)])}|",
    ]
    lines += [f"| {' | '.join(map(_escaped, row))} |" for row in rows]
    return [*lines, "", *(f"{note}  " for note in notes), ""]


def render(tables: Sequence[CollectionTable]):
    """The tables of quality alone, for rich to print."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts = []
    for table in tables:
        _, columns, rows, notes = sections(table)[0]
        shown = Table(title=table.collection, title_justify="left", pad_edge=False)
        for place, column in enumerate(columns):
            shown.add_column(column.replace("Recall", " Recall"), justify="right" if place else "left")
        for row in rows:
            shown.add_row(*(Text(cell.replace("*", ""), style="bold" if "**" in cell else "") for cell in row))
        parts += [shown, *map(Text, notes), Text()]
    return Group(*parts)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def describe_methods(plan: Plan) -> list[tuple[str, str]]:
    """Each method with what it is and what the plan sets for it."""
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


def json_text(tables: Sequence[CollectionTable]) -> str:
    """The rows with every number unrounded, and of each result all but its values per query: settings, facts, versions,
    commit and machine."""
    content = []
    for table in tables:
        rows = [
            {
                "method": row.name,
                "seeds": row.seeds,
                "means": row.means,
                "deviations": row.deviations,
                "against": {kind: vars(against) for kind, against in row.against.items()},
                "cost": row.cost,
            }
            for row in table.rows
        ]
        results = [{name: value for name, value in result.items() if name != "per_query"} for result in table.results]
        content.append({"collection": table.collection, "queries": table.num_queries, "rows": rows, "results": results})
    return json.dumps(content, indent=1) + "\n"


def csv_text(tables: Sequence[CollectionTable]) -> str:
    """One line for each collection and method, with every number unrounded."""
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
