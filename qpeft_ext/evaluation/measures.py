"""Measures of a run, by their `ir_measures` names.

A query of the qrels that the run lacks counts as 0, and a document without a judgement as not relevant. Every result
says over how many queries it averages, and which share of the documents is judged.
"""

from __future__ import annotations

import contextlib
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from ..formats.io import shorten
from ..formats.qrels import LARGEST_RELEVANCE
from ..formats.trec import Qrels, Run, decreasing_scores, expect_each_once, without_identical_ids
from ..utils.inputs import as_list
from ..utils.words import closest_words

DEFAULT_MEASURES = ("nDCG@10", "RR@10", "Success@1", "Success@5", "Success@20")
TIES = ("order", "trec_eval")
JUDGED_AT = 10
_NOBODY = "\N{REPLACEMENT CHARACTER} no document"
_MAX_GRADE = 4  # that gdeval takes
_EVAL_EXTRA = "evaluation needs the packages ir_measures and scipy: pip install 'qpeft_ext[eval]'"


@dataclass
class Evaluation:
    """Quality of one run.

    Attributes:
        means: measure -> mean over the queries of the qrels.
        per_query: measure -> query_id -> value.
        num_queries: how many queries the means are over.
        num_missing: how many of these have no candidates in the run; they count as 0.
        num_unjudged: how many queries of the run are not in the qrels; they do not count.
        judged: share of the first 10 documents (`JUDGED_AT`) that have a judgement, averaged over the queries with
            candidates.
        num_identical: documents that ``ignore_identical_ids`` left out.
    """

    means: dict[str, float]
    per_query: dict[str, dict[str, float]]
    num_queries: int
    num_missing: int
    num_unjudged: int
    judged: float
    num_identical: int = 0


def evaluate(
    run: Run,
    qrels: Qrels,
    measures: Sequence[str] = DEFAULT_MEASURES,
    *,
    ignore_identical_ids: bool = False,
    ties: str = "order",
) -> Evaluation:
    """Evaluate a run.

    Equal scores stay in the order of the ranking, so that a run in memory and the file that `write_run` makes of it
    have the same values.

    Args:
        run: query_id -> [(doc_id, score)], best first.
        qrels: query_id -> doc_id -> relevance; 0 and below is not relevant.
        measures: names of `ir_measures` such as "nDCG@10", "RR@10", "AP", "R@100", "Success@5".
        ignore_identical_ids: leave out a document that has the id of its query (ArguAna, Quora).
        ties: "order" as above. "trec_eval" sorts as trec_eval does, which orders scores that are equal as float32 by
            doc_id, the larger first; it gives trec_eval's numbers to the last digit on a run with ties.

    Returns: means over the queries of the qrels, and the values of each query.

    Raises:
        ImportError: without ir_measures.
        ValueError: for an unknown measure, a relevance beyond 1,000,000, a document that the run has twice for a query,
            or if no query is in both.

    Example: the relevant document has rank 1 for one query and rank 2 for the other::

        >>> from qpeft_ext.evaluation import evaluate
        >>> run = {"q1": [("a", 2.0), ("b", 1.0)], "q2": [("b", 3.0), ("c", 1.5)]}
        >>> qrels = {"q1": {"a": 1}, "q2": {"c": 1}}
        >>> result = evaluate(run, qrels, ["RR@10", "Success@1"])
        >>> result.means
        {'RR@10': 0.75, 'Success@1': 0.5}
        >>> result.per_query["RR@10"]
        {'q1': 1.0, 'q2': 0.5}
    """
    if ties not in TIES:
        raise ValueError(f"evaluate: ties must be one of {', '.join(TIES)}, got {ties!r}")
    parsed = parse_measures(measures)
    import ir_measures

    _check(run, qrels)
    num_identical = 0
    if ignore_identical_ids:
        run, num_identical = without_identical_ids(run)
    scored = _scored(run, qrels, ties)
    # trec_eval writes beyond its memory where all grades of a query are below 0; a document that no run has prevents it
    qrels = {
        query_id: grades if max(grades.values(), default=0) >= 0 else {**grades, _NOBODY: 0}
        for query_id, grades in qrels.items()
    }
    per_query = {name: dict.fromkeys(qrels, 0.0) for name in parsed}
    names = {measure: name for name, measure in parsed.items()}
    numbered = [measure for measure in parsed.values() if _needs_numbers(measure)]
    others = [measure for measure in parsed.values() if measure not in numbered]
    for value in chain(
        *(_values(together, qrels, scored) for together in _passes(others)),
        _with_numbers(numbered, qrels, scored) if numbered else (),
    ):
        per_query[names[value.measure]][value.query_id] = float(value.value)
    judged = [
        float(value.value)
        for value in ir_measures.iter_calc([ir_measures.Judged @ JUDGED_AT], qrels, scored)
        if value.query_id in scored
    ]
    return Evaluation(
        means={name: statistics.fmean(values.values()) for name, values in per_query.items()},
        per_query=per_query,
        num_queries=len(qrels),
        num_missing=len(qrels) - len(scored),
        num_unjudged=len(run.keys() - qrels.keys()),
        judged=statistics.fmean(judged) if judged else 0.0,
        num_identical=num_identical,
    )


def _check(run: Run, qrels: Qrels) -> None:
    """Raises: ValueError if run and qrels do not belong together, or for a relevance that trec_eval cannot take."""
    if not qrels:
        raise ValueError("evaluate: the qrels are empty")
    if not run.keys() & qrels.keys():
        raise ValueError(
            f"evaluate: no query of the run is in the qrels (run: {next(iter(run), None)!r}, ...; "
            f"qrels: {next(iter(qrels))!r}, ...); the files do not belong together"
        )
    for name, rows in (("run", run), ("qrels", {query_id: judged.items() for query_id, judged in qrels.items()})):
        for query_id, documents in rows.items():
            if wrong := next((i for i in (query_id, *(doc_id for doc_id, _ in documents)) if "\0" in i), None):
                raise ValueError(
                    f"evaluate: the id {shorten(wrong)} of the {name} has a zero byte, at which trec_eval cuts it; "
                    "rename it in run, qrels and data"
                )
    expect_each_once(run, "evaluate")
    for query_id, judged_documents in qrels.items():
        for doc_id, relevance in judged_documents.items():
            if not -LARGEST_RELEVANCE <= relevance <= LARGEST_RELEVANCE:
                raise ValueError(
                    f"evaluate: query {query_id!r}, document {doc_id!r}: expected a relevance of at most "
                    f"{LARGEST_RELEVANCE:,}, got {relevance}"
                )


def _scored(run: Run, qrels: Qrels, ties: str) -> dict[str, dict[str, float]]:
    """Return query_id -> doc_id -> a score, which are different numbers in the order of each ranking (see ``ties``).

    Queries without candidates are left out.
    """
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
    return scored


def _passes(measures: Sequence[Any]) -> Iterator[list[Any]]:
    """Yield the measures in groups, each of which ir_measures may compute in one call.

    In the same call as ``nDCG(gains={...})@10`` it takes these gains for ``nDCG@10`` too, or gives one of the two 0;
    ``judged_only`` is taken for ``NumRet`` too, and recall levels are told apart by two digits only.
    """
    alone = [m for m in measures if m.NAME in ("IPrec", "Accuracy") or not m.params.keys() <= {"cutoff", "rel"}]
    yield from ([measure] for measure in alone)
    if together := [measure for measure in measures if measure not in alone]:
        yield together


def _values(measures: list[Any], qrels: Qrels, scored: Mapping[str, Mapping[str, float]]) -> Iterator[Any]:
    """Yield the values of ``iter_calc``. Raises: ValueError for measures that ir_measures fails to compute."""
    import ir_measures

    try:
        yield from ir_measures.iter_calc(measures, qrels, scored)
    except ArithmeticError as error:  # Accuracy, if a query has no other candidates than relevant ones
        raise ValueError(
            f"evaluate: ir_measures cannot compute {', '.join(map(str, measures))} of this run ({error}); leave it out"
        ) from None


def _needs_numbers(measure: Any) -> bool:
    """Return whether gdeval computes a measure; it takes query ids for numbers, and "a-1" and "b-1" for the same."""
    return measure.NAME == "ERR" or measure.params.get("dcg") == "exp-log2"


def _with_numbers(measures: list[Any], qrels: Qrels, scored: Mapping[str, Mapping[str, float]]) -> Iterator[Any]:
    """Yield the values of ``iter_calc``, which is given numbers in place of all ids.

    Queries without a relevant document, for which gdeval divides by 0, are left out: their value is 0.

    Raises: ValueError for a grade that gdeval refuses.
    """
    import ir_measures

    for query_id, judged in qrels.items():
        if (most := max(judged.values(), default=0)) > _MAX_GRADE:
            raise ValueError(
                f"evaluate: {measures[0]} takes grades of at most {_MAX_GRADE}, got {most} for query "
                f"{shorten(query_id)}; use nDCG@10, or map the grades to 0 to {_MAX_GRADE}"
            )
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
    """Return ``ir_measures`` objects by the names that were given; a measure that is named twice is taken once.

    Raises:
        ImportError: without ir_measures.
        ValueError: for a name that is no measure.
    """
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
            raise ValueError(
                f"unknown measure {name!r}; "
                + (f"did you mean {closest}? " if closest else "")
                + "expected ir_measures names such as nDCG@10, RR@10, AP@100, R@100, P@5, Success@5"
            )
        if measure not in parsed.values():  # NDCG@10 is nDCG@10
            parsed[name] = measure
    return parsed


def is_measure(name: str) -> bool:
    """Return whether `parse_measures` knows the name; False without ir_measures."""
    try:
        return _measure(name) is not None
    except ImportError:
        return False


def _measure(name: str) -> Any:
    """Return the object of a name of ir_measures or trec_eval (``map``, ``ndcg_cut_10``); None for other names."""
    import ir_measures

    for parse in (ir_measures.parse_measure, _parse_trec_measure):
        # the errors that the parser raises for words that are no measure
        with contextlib.suppress(
            ValueError, NameError, SyntaxError, TypeError, AttributeError, KeyError, AssertionError
        ):
            measure = parse(name)
            if _is_within_bounds(measure) and ir_measures.DefaultPipeline.supports(measure):
                return measure
    return None


def _is_within_bounds(measure: Any) -> bool:
    """Tell whether trec_eval can take the numbers of a measure: it aborts the process for a cutoff or a level of 0."""
    levels = (measure.params.get("cutoff", 1), measure.params.get("rel", 1))
    gains = chain(*measure.params.get("gains", {}).items())
    return all(1 <= level < 1 << 31 and level is not True for level in levels) and all(
        type(gain) is int and abs(gain) <= LARGEST_RELEVANCE for gain in gains
    )


def _parse_trec_measure(name: str) -> Any:
    import ir_measures

    (measure,) = ir_measures.parse_trec_measure(name)  # a name of several measures is a ValueError here
    return measure


def closest_measure(name: str) -> str | None:
    """Return a measure that the user may have meant: with other capitals, without a typing error, or with a cutoff."""
    from ir_measures.measures import registry

    word, at, cutoff = name.partition("@")
    by_lower = {known.lower(): known for known in registry}
    for found in closest_words(word.lower(), by_lower, most=5):
        for ending in (at + cutoff, "@10", "") if at else ("", "@10"):
            if (measure := _measure(by_lower[found] + ending)) is not None:
                return str(measure)
    return None


_CANDIDATE_RECALL = re.compile(r"CandidateRecall@([1-9][0-9]*)")


def check_measures(names: Sequence[str]) -> None:
    """Raises: ValueError for a name that is no measure."""
    if rest := [name for name in names if not _CANDIDATE_RECALL.fullmatch(name)]:
        try:
            parse_measures(rest)
        except ValueError as error:
            raise ValueError(f"{error}, or CandidateRecall@5") from None


def per_query(run: Run, qrels: Qrels, measures: Sequence[str]) -> dict[str, dict[str, float]]:
    """Compute values for each query, of the measures of `evaluate` and of ``CandidateRecall@k``.

    ``CandidateRecall@k`` is the recall of the Q-PEFT paper's code: relevant documents among the first k, divided by
    those among all candidates. A query without a relevant candidate has no such value and is left out, as in the
    "clean" variant of that code.

    Returns: measure -> query_id -> value.
    """
    own = {name: int(match[1]) for name in measures if (match := _CANDIDATE_RECALL.fullmatch(name))}
    rest = [name for name in measures if name not in own]
    values = evaluate(run, qrels, rest).per_query if rest else {}
    for name, k in own.items():
        hits = {
            query_id: [qrels[query_id].get(doc_id, 0) > 0 for doc_id, _ in run.get(query_id, ())] for query_id in qrels
        }
        values[name] = {query_id: sum(found[:k]) / sum(found) for query_id, found in hits.items() if any(found)}
    return {name: values[name] for name in measures if name in values}
