"""Measures by their `ir_measures` names, paired tests between systems, and tables that compare them.

A query of the qrels that a run does not hold counts as 0, a document without a judgement as not relevant, and every
result says over how many queries it averages and how much of what counts is judged.
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
from ..formats.trec import Qrels, Run, decreasing_scores, without_identical_ids
from ..utils.inputs import as_list
from ..utils.words import closest_words

DEFAULT_MEASURES = ("nDCG@10", "RR@10", "Success@1", "Success@5", "Success@20")
TIES = ("order", "trec_eval")
JUDGED_AT = 10
_NOBODY = "\N{REPLACEMENT CHARACTER} no document"
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
    run: Run,
    qrels: Qrels,
    measures: Sequence[str] = DEFAULT_MEASURES,
    *,
    ignore_identical_ids: bool = False,
    ties: str = "order",
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
    Raises: ImportError without ir_measures; ValueError for an unknown measure, a relevance beyond 1,000,000, or if no
        query is in both.
    """
    if ties not in TIES:
        raise ValueError(f"evaluate: ties must be one of {', '.join(TIES)}, got {ties!r}")
    parsed = parse_measures(measures)
    import ir_measures

    if not qrels:
        raise ValueError("evaluate: the qrels are empty")
    if not run.keys() & qrels.keys():
        raise ValueError(
            f"evaluate: no query of the run is in the qrels (run: {next(iter(run), None)!r}, ...; "
            f"qrels: {next(iter(qrels))!r}, ...); the files do not belong together"
        )
    for query_id, judged_documents in qrels.items():
        for doc_id, relevance in judged_documents.items():
            if not -LARGEST_RELEVANCE <= relevance <= LARGEST_RELEVANCE:
                raise ValueError(
                    f"evaluate: query {query_id!r}, document {doc_id!r}: expected a relevance of at most "
                    f"{LARGEST_RELEVANCE:,}, got {relevance}"
                )
    # where all grades of a query are below 0 trec_eval writes beside its memory; a document that nobody retrieves helps
    qrels = {
        query_id: grades if max(grades.values(), default=0) >= 0 else {**grades, _NOBODY: 0}
        for query_id, grades in qrels.items()
    }
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
    for value in chain(
        ir_measures.iter_calc(others, qrels, scored) if others else (),
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


def _needs_numbers(measure: Any) -> bool:
    """Whether gdeval computes it: it takes numbers as query ids, and of "a-1" and "b-1" makes the same query."""
    return measure.NAME == "ERR" or measure.params.get("dcg") == "exp-log2"


def _with_numbers(measures: list[Any], qrels: Qrels, scored: Mapping[str, Mapping[str, float]]) -> Iterator[Any]:
    """``iter_calc`` with numbers in place of all ids; queries without a relevant document, which gdeval divides by, are
    left out: their value is 0. Raises: ValueError for a grade that gdeval refuses."""
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
            raise ValueError(
                f"unknown measure {name!r}; "
                + (f"did you mean {closest}? " if closest else "")
                + "expected ir_measures names such as nDCG@10, RR@10, AP@100, R@100, P@5, Success@5"
            )
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
        with contextlib.suppress(
            ValueError, NameError, SyntaxError, TypeError, AttributeError, KeyError, AssertionError
        ):
            measure = parse(name)
            levels = (measure.params.get("cutoff", 1), measure.params.get("rel", 1))
            # trec_eval aborts the process for a cutoff or a level of 0
            if all(level >= 1 and level is not True for level in levels) and ir_measures.DefaultPipeline.supports(
                measure
            ):
                return measure
    return None


def _parse_trec_measure(name: str) -> Any:
    import ir_measures

    (measure,) = ir_measures.parse_trec_measure(name)  # some names stand for several, which is an error here
    return measure


def closest_measure(name: str) -> str | None:
    """A measure that the user may have meant: other letters in upper case, a typing error, a cutoff left out."""
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
    """measure -> query_id -> value.

    ``CandidateRecall@k`` is the recall of the Q-PEFT paper's code: relevant documents among the first k, divided by
    those among all candidates. Queries without a relevant candidate have no such value, so it averages over fewer
    queries (the code's "clean" variant). Everything else is as `evaluate` has it, over all queries of the qrels.
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
