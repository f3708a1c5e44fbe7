"""Several systems side by side, each tested against the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..formats.trec import Qrels, Run
from .measures import DEFAULT_MEASURES, JUDGED_AT, evaluate
from .significance import format_p, holm, paired_test


@dataclass
class System:
    """One row of a `ComparisonTable`; ``difference``, ``p_value`` and ``p_holm`` (against the baseline) are empty for
    it. ``p_holm`` is corrected for the number of systems compared, measure by measure; it is what tables show."""

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
    """Systems over the same queries, each against the baseline. ``render`` shows it, ``to_dict`` is for JSON."""

    measures: list[str]
    baseline: str
    test: str
    num_queries: int
    systems: list[System]

    def to_dict(self) -> dict[str, Any]:
        """Plain values; a p-value that does not exist (fewer than two queries) is None."""
        result = asdict(self)
        for system in result["systems"]:
            for key in ("p_value", "p_holm"):
                system[key] = {name: None if p != p else p for name, p in system[key].items()}
        return result

    def notes(self) -> list[str]:
        """What a reader must know beside the numbers, one sentence each."""
        lines = [f"{self.num_queries} queries"]
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
                lines.append(f"{system.name}: {system.num_identical} documents with the id of their query left out")
            if system.num_missing:
                lines.append(f"{system.name}: no candidates for {system.num_missing} queries; they count as 0")
            if system.num_unjudged:
                lines.append(f"{system.name}: {system.num_unjudged} queries are not in the qrels and do not count")
        return lines

    def render(self, seconds_per_query: Mapping[str, str] | None = None):
        """The table and its notes, for rich to print: one column per measure, and one for times if there are any."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(pad_edge=False)
        table.add_column("system")
        for measure in [*self.measures, *(["s per query"] if seconds_per_query else [])]:
            table.add_column(measure, justify="right", no_wrap=True)
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
        baseline: a name of ``runs``; None: the first one.
        test: see `paired_test`.  ties: see `evaluate`.
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
