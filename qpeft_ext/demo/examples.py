"""Queries that the report shows, with the clues of their documents."""

from __future__ import annotations

from collections.abc import Sequence

from ..evaluation.report import Clue, Example
from ..formats.trec import Run
from ..ranking.reranker import Reranker
from ..utils.words import counted
from .data import Split


def report_examples(reranker: Reranker, method: str, test: Split, before: Run, after: Run) -> list[Example]:
    """Explain three queries: where the relevant document gained most ranks, the median, and where it lost most.

    Args:
        reranker: explains the clues.
        method: its name in the report.
        test: test queries.
        before, after: runs of the first stage and of the reranker.
    """
    moved = []
    for query_id, relevant in test.qrels.items():
        doc_id = next((d for d in relevant if relevant[d] > 0), "")
        rank_before, rank_after = _rank(before.get(query_id, []), doc_id), _rank(after.get(query_id, []), doc_id)
        if rank_before is not None and rank_after is not None:
            moved.append((rank_before - rank_after, query_id, doc_id, rank_before, rank_after))
    moved.sort(reverse=True)
    if not moved:
        return []
    chosen = {0: "largest gain", len(moved) // 2: "median", len(moved) - 1: "largest loss"}
    examples = []
    for place, note in chosen.items():
        _, query_id, doc_id, rank_before, rank_after = moved[place]
        explanation = reranker.explain(test.queries[query_id], test.documents[doc_id])
        clues = [Clue(span.start, span.end, span.weight) for span in explanation.clues]
        examples.append(
            Example(
                explanation.query,
                doc_id,
                explanation.text,
                clues,
                rank_before,
                rank_after,
                True,
                method,
                f"Change of rank, {note} of {counted(len(moved), 'queries')} whose document was a candidate: "
                f"{counted(rank_before - rank_after, 'places', spec='+d')}.",
            )
        )
    return examples


def _rank(ranking: Sequence[tuple[str, float]], doc_id: str) -> int | None:
    return next((rank for rank, (candidate, _) in enumerate(ranking, start=1) if candidate == doc_id), None)
