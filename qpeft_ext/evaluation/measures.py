"""Measures by their `ir_measures` names, paired tests between systems, and tables that compare them.

A query of the qrels that a run does not hold counts as 0, a document without a judgement as not relevant, and every
result says over how many queries it averages and how much of what counts is judged.
"""

from __future__ import annotations

import contextlib
import difflib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from ..formats.io import shorten
from ..formats.trec import Qrels, Run, decreasing_scores, without_identical_ids
from ..utils.inputs import as_list

DEFAULT_MEASURES = ("nDCG@10", "RR@10", "Success@1", "Success@5", "Success@20")
TESTS = ("t-test", "permutation")
TIES = ("order", "trec_eval")
JUDGED_AT = 10
_MAX_GRADE = 4  # of gdeval
_EVAL_EXTRA = "evaluation needs the packages ir_measures and scipy: pip install qpeft_ext[eval]"


@dataclass
class Evaluation:
    """Quality of one run.

    means: measure -> mean over the queries of the qrels.  per_query: measure -> query_id -> value.
    num_queries: how many the means are over.  num_missing: those of them that the run has no candidates for (they
    count as 0).  num_unjudged: queries of the run that are not in the qrels (they do not count).  num_identical:
    documents left out by ``ignore_identical_ids``.  judged: the share of the first `JUDGED_AT` documents that have a
    judgement, mean over the queries with candidates.
    """

    means: dict[str, float]
    per_query: dict[str, dict[str, float]]
    num_queries: int
    num_missing: int
    num_unjudged: int
    judged: float
    num_identical: int = 0


def evaluate(
    run: Run, qrels: Qrels, measures: Sequence[str] = DEFAULT_MEASURES, *,
    ignore_identical_ids: bool = False, ties: str = "order",
) -> Evaluation:
    """Evaluate a run.

    The order of each ranking is what counts: equal scores stay in the order they come in (see `decreasing_scores`),
    so a run in memory and the file that `write_run` makes of it have the same values.

    Args:
        run: query_id -> [(doc_id, score)], best first.
        measures: names such as "nDCG@10", "RR@10", "AP", "R@100", "Success@5".
        ignore_identical_ids: leave out a document whose id is that of the query (ArguAna, Quora).
        ties: "order" as above; "trec_eval" gives scores that are equal as float32 the order of trec_eval, the larger
            doc_id first, for its figures to the last digit on a run that has ties.
    Raises: ImportError without ir_measures; ValueError for an unknown measure, or if no query is in both.
    """
    if ties not in TIES:
        raise ValueError(f"evaluate: ties must be one of {', '.join(TIES)}, got {ties!r}")
    parsed = parse_measures(measures)
    import ir_measures

    if not qrels:
        raise ValueError("evaluate: the qrels are empty")
    if not run.keys() & qrels.keys():
        raise ValueError(f"evaluate: no query of the run is in the qrels (run: {next(iter(run), None)!r}, ...; "
                         f"qrels: {next(iter(qrels))!r}, ...); the files do not belong together")
    num_identical = 0
    if ignore_identical_ids:
        run, num_identical = without_identical_ids(run)
    scored: dict[str, dict[str, float]] = {}
    for query_id in qrels:
        ranking = list(run.get(query_id, ()))
        if ranking:
            if ties == "trec_eval":
                ranking.sort(key=lambda candidate: (np.float32(candidate[1]), candidate[0]), reverse=True)
            try:
                scores = decreasing_scores([score for _, score in ranking])
            except ValueError as error:
                raise ValueError(f"evaluate: query {query_id!r}: {error}") from None
            scored[query_id] = {doc_id: score for (doc_id, _), score in zip(ranking, scores, strict=True)}
    per_query = {name: dict.fromkeys(qrels, 0.0) for name in parsed}
    names = {measure: name for name, measure in parsed.items()}
    numbered = [measure for measure in parsed.values() if _needs_numbers(measure)]
    others = [measure for measure in parsed.values() if measure not in numbered]
    for value in chain(ir_measures.iter_calc(others, qrels, scored) if others else (),
                       _with_numbers(numbered, qrels, scored) if numbered else ()):
        per_query[names[value.measure]][value.query_id] = float(value.value)
    judged = [float(value.value) for value in ir_measures.iter_calc([ir_measures.Judged @ JUDGED_AT], qrels, scored)
              if value.query_id in scored]
    return Evaluation(
        means={name: statistics.fmean(values.values()) for name, values in per_query.items()},
        per_query=per_query,
        num_queries=len(qrels),
        num_missing=len(qrels) - len(scored),
        num_unjudged=len(run.keys() - qrels.keys()),
        judged=statistics.fmean(judged) if judged else 0.0,
        num_identical=num_identical,
    )


def _needs_numbers(measure: Any) -> bool:
    """Whether gdeval computes it: it takes numbers as query ids, and of "a-1" and "b-1" makes the same query."""
    return measure.NAME == "ERR" or measure.params.get("dcg") == "exp-log2"


def _with_numbers(measures: list[Any], qrels: Qrels, scored: Mapping[str, Mapping[str, float]]) -> Iterator[Any]:
    """``iter_calc`` with numbers in place of all ids; queries without a relevant document, which gdeval divides by, are
    left out: their value is 0. Raises: ValueError for a grade that gdeval refuses."""
    import ir_measures

    for query_id, judged in qrels.items():
        if (most := max(judged.values(), default=0)) > _MAX_GRADE:
            raise ValueError(f"evaluate: {measures[0]} takes grades of at most {_MAX_GRADE}, got {most} for query "
                             f"{shorten(query_id)}; use nDCG@10, or map the grades to 0 to {_MAX_GRADE}")
    query_ids = [query_id for query_id, judged in qrels.items() if max(judged.values(), default=0) > 0]
    new_qrels, new_scored = {}, {}
    for number, query_id in enumerate(query_ids, start=1):
        places = {doc_id: f"d{place}" for place, doc_id in enumerate({**qrels[query_id], **scored.get(query_id, {})})}
        new_qrels[str(number)] = {places[doc_id]: max(0, grade) for doc_id, grade in qrels[query_id].items()}
        if query_id in scored:
            new_scored[str(number)] = {places[doc_id]: score for doc_id, score in scored[query_id].items()}
    for value in ir_measures.iter_calc(measures, new_qrels, new_scored) if new_scored else ():
        yield value._replace(query_id=query_ids[int(value.query_id) - 1])


def parse_measures(names: Sequence[str]) -> dict[str, Any]:
    """``ir_measures`` objects by the names they were asked for. Raises: ImportError, or ValueError for a bad name."""
    try:
        import ir_measures  # noqa: F401
    except ImportError:
        raise ImportError(_EVAL_EXTRA) from None
    names = as_list(names, "evaluate: measures", "one measure goes into a list: ['nDCG@10']")
    if not names:
        raise ValueError("evaluate: expected at least one measure, such as nDCG@10")
    parsed: dict[str, Any] = {}
    for name in names:
        measure = _measure(name)
        if measure is None:
            closest = closest_measure(name)
            raise ValueError(f"unknown measure {name!r}; " + (f"did you mean {closest}? " if closest else "")
                             + "expected ir_measures names such as nDCG@10, RR@10, AP@100, R@100, P@5, Success@5")
        if measure not in parsed.values():  # NDCG@10 is nDCG@10
            parsed[name] = measure
    return parsed


def is_measure(name: str) -> bool:
    """Whether `parse_measures` knows the name; False without ir_measures."""
    try:
        return _measure(name) is not None
    except ImportError:
        return False


def _measure(name: str) -> Any:
    """The ``ir_measures`` object of a name of its own or of trec_eval (``map``, ``ndcg_cut_10``); None for others."""
    import ir_measures

    for parse in (ir_measures.parse_measure, _parse_trec_measure):
        # what its parser raises for words that are no measure
        with contextlib.suppress(ValueError, NameError, SyntaxError, TypeError, AttributeError, KeyError,
                                 AssertionError):
            measure = parse(name)
            levels = (measure.params.get("cutoff", 1), measure.params.get("rel", 1))
            # trec_eval aborts the process for a cutoff or a level of 0
            if all(level >= 1 and level is not True for level in levels) and \
                    ir_measures.DefaultPipeline.supports(measure):
                return measure
    return None


def _parse_trec_measure(name: str) -> Any:
    import ir_measures

    measure, = ir_measures.parse_trec_measure(name)  # some names stand for several, which is an error here
    return measure


def closest_measure(name: str) -> str | None:
    """A measure that the user may have meant: other letters in upper case, a typing error, a cutoff left out."""
    from ir_measures.measures import registry

    word, at, cutoff = name.partition("@")
    by_lower = {known.lower(): known for known in registry}
    for found in difflib.get_close_matches(word.lower(), by_lower, n=5, cutoff=0.6):
        for ending in (at + cutoff, "@10", "") if at else ("", "@10"):
            if (measure := _measure(by_lower[found] + ending)) is not None:
                return str(measure)
    return None


def paired_test(first: Mapping[str, float], second: Mapping[str, float], test: str = "t-test", seed: int = 0) -> float:
    """Two-sided p-value of the paired difference between two systems over the same queries.

    Args:
        first, second: query_id -> value, same queries.
        test: "t-test" (`scipy.stats.ttest_rel`) or "permutation" (signs of the differences, 9,999 draws or all).
    Returns: p; 1.0 if no query differs, NaN with fewer than two queries.
    """
    if test not in TESTS:
        raise ValueError(f"paired_test: test must be one of {', '.join(TESTS)}, got {test!r}")
    if first.keys() != second.keys():
        raise ValueError(f"paired_test: both systems need the same queries, got {len(first)} and {len(second)}, "
                         f"{len(first.keys() & second.keys())} in common")
    difference = np.array([first[query_id] - second[query_id] for query_id in first])
    if len(difference) < 2:
        return float("nan")
    if not difference.any():
        return 1.0
    if np.ptp(difference) == 0 and test == "t-test":
        return 0.0  # the same difference on every query: no variance to test against
    try:
        from scipy import stats
    except ImportError:
        raise ImportError(_EVAL_EXTRA) from None
    if test == "t-test":
        return float(stats.ttest_1samp(difference, 0.0).pvalue)  # ttest_rel is this test on the difference
    result = stats.permutation_test((difference,), np.mean, permutation_type="samples", vectorized=True,
                                    n_resamples=9999, rng=np.random.default_rng(seed))
    return float(result.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction (1979) for that many comparisons at once; a NaN is no comparison and stays one.

    The smallest of m is multiplied by m, the next by m − 1, and so on; none becomes smaller than one before it, or
    larger than 1.
    """
    order = sorted((place for place, p in enumerate(p_values) if p == p), key=lambda place: p_values[place])
    corrected, largest = list(p_values), 0.0
    for left, place in zip(range(len(order), 0, -1), order, strict=True):
        largest = max(largest, min(1.0, left * p_values[place]))
        corrected[place] = largest
    return corrected


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
            lines[0] += (f"; difference to {self.baseline} and two-sided p-value, "
                         f"paired {'t-test' if self.test == 't-test' else 'permutation test'}")
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
    runs: Mapping[str, Run], qrels: Qrels, measures: Sequence[str] = DEFAULT_MEASURES, baseline: str | None = None, *,
    test: str = "t-test", ignore_identical_ids: bool = False, ties: str = "order",
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
    results = {name: evaluate(run, qrels, measures, ignore_identical_ids=ignore_identical_ids, ties=ties)
               for name, run in runs.items()}
    base = results[baseline]
    systems = []
    for name, result in results.items():
        system = System(name, result.means, num_missing=result.num_missing, num_unjudged=result.num_unjudged,
                        judged=result.judged, num_identical=result.num_identical)
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


def format_p(p: float) -> str:
    """A p-value as a table shows it."""
    return "p –" if p != p else "p<.001" if p < 0.001 else f"p={p:.3f}".replace("0.", ".", 1)
