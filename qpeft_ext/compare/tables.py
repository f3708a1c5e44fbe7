"""Rows of tables from the results of a comparison: means over queries and seeds, tests of significance, and costs.

`sections` says how a table is shown.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..evaluation.significance import changes, holm, paired_test
from ..utils.console import say
from .cells import Cell, cells
from .methods import FIRST_STAGE, UPR
from .plan import Method, Plan
from .settings import changed, plan_settings

AGAINST = (FIRST_STAGE, UPR)  # the baselines, by what they are; a table names them as the plan does


@dataclass
class Against:
    """A method against a baseline, by measure.

    Attributes:
        difference: difference of the means.
        p_holm: two-sided p-value of the paired t-test, Holm-corrected for the methods that are compared.
        gain, lose: how many queries have a larger or a smaller value.
    """

    difference: dict[str, float] = field(default_factory=dict)
    p_holm: dict[str, float] = field(default_factory=dict)
    gain: dict[str, int] = field(default_factory=dict)
    lose: dict[str, int] = field(default_factory=dict)


@dataclass
class Row:
    """A method on a collection.

    Attributes:
        method: the method.
        seeds: how many seeds have a result.
        expected: how many seeds the plan asks for.
        per_query: measure -> query_id -> value, the mean over the seeds.
        means: measure -> mean over the queries.
        deviations: measure -> sample standard deviation over the seeds' means, where there are seeds and queries.
        against: baseline (a name of `AGAINST`) -> comparison with it.
        cost: name of `COSTS` -> mean over the seeds; None where it does not apply.
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
    """All methods on one collection.

    Attributes:
        collection: its name.
        measures: their names; the first one decides, and is plotted.
        rows: methods in the order of the plan, the first stage first.
        baselines: baseline (a name of `AGAINST`) -> name of its row.
        num_queries: measure -> how many queries it is averaged over.
        results: the results that the rows are made of, as ``result.json`` has them.
    """

    collection: str
    measures: list[str]
    rows: list[Row]
    baselines: dict[str, str]
    num_queries: dict[str, int]
    results: list[dict[str, Any]] = field(repr=False)


class Cost(NamedTuple):
    """A column of the table of costs.

    Attributes:
        heading: its heading, with the unit.
        found_at: where a result has it: the part of ``result.json``, and the name there or one that `_cost_facts` adds.
        digits: how a number is shown (a format specification).
    """

    heading: str
    found_at: tuple[str, str]
    digits: str


COSTS = {  # by the name in `Row.cost`
    "trainable": Cost("trainable parameters", ("parameters", "trainable"), ",.0f"),
    "trainable_percent": Cost("% of all", ("parameters", "percent"), ".2f"),
    "training_seconds": Cost("training, s", ("training", "seconds"), ".1f"),
    "training_megabytes": Cost("training, peak MB", ("training", "megabytes"), ",.0f"),
    "ranking_megabytes": Cost("ranking, peak MB", ("ranking", "megabytes"), ",.0f"),
    "documents_per_second": Cost("documents per s", ("ranking", "documents_per_second"), ",.0f"),
    "queries_per_petaflop": Cost("queries per PetaFLOP", ("ranking", "queries_per_petaflop"), ",.0f"),
}
FROM_INDEX = "prefixes_from_index"  # in a result, of its training and of its ranking


def build_tables(plan: Plan, output: Path) -> list[CollectionTable]:
    """Read the results that are there. One that was made with other settings than the plan's is left out, with a note.

    Raises: ValueError if there are none, or if one has no values for a measure of the plan.
    """
    tables = []
    for collection in plan.collections:
        grouped: dict[str, tuple[Method, list[dict | None]]] = {}
        for cell in cells(plan, output):
            if cell.collection == collection:
                grouped.setdefault(cell.method.name, (cell.method, []))[1].append(_read(plan, cell))
        order = [name for name in plan.methods if name in grouped]
        order = [name for name in grouped if name not in order] + order  # a plan may not name the first stage
        rows = [row for name in order if (row := _row(plan, *grouped[name])) is not None]
        results = [result for _, found in grouped.values() for result in found if result]
        if rows:
            tables.append(_table(collection, list(plan.measures), rows, results))
    if not tables:
        raise ValueError(f"{output}: there is no result of this plan yet")
    return tables


def _read(plan: Plan, cell: Cell) -> dict[str, Any] | None:
    """Read a result; None if there is none, or if the plan has changed since it was made."""
    result = cell.read()
    if result and (names := changed(result.get("settings", {}), plan_settings(plan, cell.method, cell.seed))):
        say(f"{cell.name}: left out of the tables, since {', '.join(names)} changed; run the comparison again")
        return None
    return result


def _row(plan: Plan, method: Method, found: Sequence[dict | None]) -> Row | None:
    """Average the results of a method over its seeds; None if there are none."""
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
        if len(results) > 1 and of_seeds[0]:  # a mean over no query has no deviation
            row.deviations[measure] = statistics.stdev([_mean(values.values()) for values in of_seeds])
    facts = [_cost_facts(result) for result in results]
    for name, cost in COSTS.items():
        values = [value for of_seed in facts if (value := of_seed.get(cost.found_at)) is not None]
        row.cost[name] = statistics.fmean(values) if values else None
    return row


def _cost_facts(result: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    """Return the facts of a result by their part and name, with percentages and megabytes added."""
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
        if facts.get((part, FROM_INDEX)):  # the method itself would have taken longer
            for name in ("seconds", "documents_per_second", "queries_per_petaflop"):
                facts.pop((part, name), None)
    return facts


def _table(collection: str, measures: list[str], rows: list[Row], results: list[dict]) -> CollectionTable:
    """Compare the rows with the baselines among them, and return them as a table."""
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
                against, change = row.against[kind], changes(row.per_query[measure], base.per_query[measure])
                against.difference[measure] = _mean(change.tolist())
                against.p_holm[measure] = p
                against.gain[measure] = int((change > 0).sum())
                against.lose[measure] = int((change < 0).sum())
    num_queries = {measure: len(rows[0].per_query[measure]) for measure in measures}
    return CollectionTable(collection, measures, rows, baselines, num_queries, results)


def _mean(values: Collection[float]) -> float:
    return statistics.fmean(values) if values else float("nan")
