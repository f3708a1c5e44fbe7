"""Which queries the report shows, with their clues marked in the text."""

from __future__ import annotations

from ..evaluation.report import Clue, Example
from ..formats.trec import Run
from .data import Part


def report_examples(reranker, method: str, test: Part, before: Run, after: Run) -> list[Example]:
    """Three queries: where the relevant document gained most places, the median, and where it lost most."""
    moved = []
    for query_id, relevant in test.qrels.items():
        doc_id = next((d for d in relevant if relevant[d] > 0), None)
        ranks = _rank(before.get(query_id, []), doc_id), _rank(after.get(query_id, []), doc_id)
        if None not in ranks:
            moved.append((ranks[0] - ranks[1], query_id, doc_id, *ranks))
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
                f"Change of rank, {note} of {len(moved)} queries whose document was a candidate: "
                f"{rank_before - rank_after:+d} places.",
            )
        )
    return examples


def _rank(ranking: list, doc_id: str | None) -> int | None:
    return next((place for place, (candidate, _) in enumerate(ranking, start=1) if candidate == doc_id), None)
