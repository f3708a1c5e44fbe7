"""Values per query: every measure of ir_measures, and recall as the paper counts it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..evaluation.measures import evaluate, parse_measures
from ..formats.trec import Qrels, Run

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
        hits = {query_id: [qrels[query_id].get(doc_id, 0) > 0 for doc_id, _ in run.get(query_id, ())]
                for query_id in qrels}
        values[name] = {query_id: sum(found[:k]) / sum(found) for query_id, found in hits.items() if any(found)}
    return {name: values[name] for name in measures if name in values}
