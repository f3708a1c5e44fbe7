"""Systems side by side, each tested against a baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..formats.trec import Qrels, Run
from ..utils.words import counted
from .measures import DEFAULT_MEASURES, JUDGED_AT, evaluate
from .significance import format_p, holm, paired_test

if TYPE_CHECKING:
    from rich.console import Group


@dataclass
class System:
    """One row of a `ComparisonTable`.

    Attributes:
        name: name of the system.
        values: measure -> mean over the queries.
        difference, p_value: measure -> difference to the baseline, and p-value of the paired test; empty for the
            baseline itself.
        p_holm: measure -> p-value, corrected for the number of systems that are compared; tables show this one.
        num_missing, num_unjudged, judged, num_identical: as in `Evaluation`.
    """

    name: str
    values: dict[str, float]
    difference: dict[str, float] = field(default_factory=dict)
    p_value: dict[str, float] = field(default_factory=dict)
    p_holm: dict[str, float] = field(default_factory=dict)
    num_missing: int = 0
    num_unjudged: int = 0
    judged: float = 1.0
    num_identical: int = 0


@dataclass
class ComparisonTable:
    """Systems over the same queries, each compared with a baseline.

    Attributes:
        measures: names of the measures.
        baseline: name of the baseline.
        test: the paired test; see `paired_test`.
        num_queries: how many queries the means are over.
        systems: the systems, in the order of the table.
    """

    measures: list[str]
    baseline: str
    test: str
    num_queries: int
    systems: list[System]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON; a p-value that does not exist (with fewer than two queries) is None."""
        result = asdict(self)
        for system in result["systems"]:
            for key in ("p_value", "p_holm"):
                system[key] = {name: None if p != p else p for name, p in system[key].items()}
        return result

    def notes(self) -> list[str]:
        """Return sentences about what a reader must know beside the numbers."""
        lines = [counted(self.num_queries, "queries")]
        if (others := len(self.systems) - 1) > 0:
            lines[0] += (
                f"; difference to {self.baseline} and two-sided p-value, "
                f"paired {'t-test' if self.test == 't-test' else 'permutation test'}"
            )
            lines[0] += f", Holm-corrected for {others} comparisons" if others > 1 else ""
        if any(system.judged < 1 for system in self.systems):
            shares = ", ".join(f"{system.name} {system.judged:.3f}" for system in self.systems)
            lines.append(f"Judged@{JUDGED_AT}: {shares}; documents without a judgement count as not relevant")
        for system in self.systems:
            if system.num_identical:
                identical = counted(
                    system.num_identical, "documents with the id of their query", "document with the id of its query"
                )
                lines.append(f"{system.name}: {identical} left out")
            if system.num_missing:
                missing = counted(system.num_missing, "queries; they count as 0", "query; it counts as 0")
                lines.append(f"{system.name}: no candidates for {missing}")
            if system.num_unjudged:
                unjudged = counted(
                    system.num_unjudged,
                    "queries are not in the qrels and do not count",
                    "query is not in the qrels and does not count",
                )
                lines.append(f"{system.name}: {unjudged}")
        return lines

    def render(self, seconds_per_query: Mapping[str, str] | None = None) -> Group:
        """Return the table and its notes for rich to print.

        Args:
            seconds_per_query: system -> time, shown in a column of its own; None: no such column.
        """
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(pad_edge=False)
        table.add_column("system")
        for measure in [*self.measures, *(["s per query"] if seconds_per_query else [])]:
            table.add_column(measure, justify="right", no_wrap=True, min_width=len(measure))
        best = {m: max(system.values[m] for system in self.systems) for m in self.measures}
        for system in self.systems:
            cells = []
            for measure in self.measures:
                value = system.values[measure]
                cell = Text(f"{value:.4f}", style="bold" if value == best[measure] else "")
                if system.difference:
                    cell.append(f"\n{system.difference[measure]:+.4f}", style="not bold")
                    cell.append(f"\n{format_p(system.p_holm[measure])}", style="not bold dim")
                cells.append(cell)
            if seconds_per_query:
                cells.append(Text(seconds_per_query.get(system.name, "–")))
            table.add_row(Text(system.name), *cells)
        return Group(table, *map(Text, self.notes()))


def compare_table(
    runs: Mapping[str, Run],
    qrels: Qrels,
    measures: Sequence[str] = DEFAULT_MEASURES,
    baseline: str | None = None,
    *,
    test: str = "t-test",
    ignore_identical_ids: bool = False,
    ties: str = "order",
) -> ComparisonTable:
    """Evaluate several runs and compare each with the baseline, query by query.

    Args:
        runs: name of the system -> run, in the order of the table.
        qrels: query_id -> doc_id -> relevance.
        measures: names as for `evaluate`.
        baseline: a name of ``runs``; None: the first one.
        test: "t-test" or "permutation"; see `paired_test`.
        ignore_identical_ids, ties: as for `evaluate`.

    Returns: the table; its ``render()`` can be printed with rich, its ``to_dict()`` written as JSON.

    Raises:
        ImportError: without ir_measures or scipy.
        ValueError: without runs, for a baseline that is not among them, and as `evaluate` and `paired_test`.

    Example: one of two queries gains 0.5, so t = 0.25 / 0.25 = 1 with one degree of freedom, and p = 0.5::

        >>> from qpeft_ext.evaluation import compare_table
        >>> qrels = {"q1": {"a": 1}, "q2": {"c": 1}}
        >>> before = {"q1": [("a", 2.0), ("b", 1.0)], "q2": [("b", 3.0), ("c", 1.5)]}
        >>> after = {"q1": [("a", 0.9), ("b", 0.1)], "q2": [("c", 0.8), ("b", 0.3)]}
        >>> table = compare_table({"before": before, "after": after}, qrels, ["RR@10"])
        >>> print(table.systems[1].values, table.systems[1].difference, f"p = {table.systems[1].p_holm['RR@10']:.3f}")
        {'RR@10': 1.0} {'RR@10': 0.25} p = 0.500
    """
    if not runs:
        raise ValueError("compare_table: expected at least one run")
    baseline = next(iter(runs)) if baseline is None else baseline
    if baseline not in runs:
        raise ValueError(f"compare_table: the baseline {baseline!r} is not among the runs {', '.join(runs)}")
    results = {
        name: evaluate(run, qrels, measures, ignore_identical_ids=ignore_identical_ids, ties=ties)
        for name, run in runs.items()
    }
    base = results[baseline]
    systems = []
    for name, result in results.items():
        system = System(
            name,
            result.means,
            num_missing=result.num_missing,
            num_unjudged=result.num_unjudged,
            judged=result.judged,
            num_identical=result.num_identical,
        )
        if name != baseline:
            for measure in result.means:
                system.difference[measure] = result.means[measure] - base.means[measure]
                system.p_value[measure] = paired_test(result.per_query[measure], base.per_query[measure], test)
        systems.append(system)
    others = [system for system in systems if system.p_value]
    for measure in base.means:
        for system, p in zip(others, holm([other.p_value[measure] for other in others]), strict=True):
            system.p_holm[measure] = p
    return ComparisonTable(list(base.means), baseline, test, base.num_queries, systems)
