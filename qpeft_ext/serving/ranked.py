"""`Ranked`: the scores of a request, sorted, as the bodies of responses need them."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..prompts.prompt import document_text
from .errors import RequestError
from .prepare import Prepared

_SPANS = 100  # results of a request for which spans are found


@dataclass(frozen=True)
class Result:
    """One document of a response.

    Attributes:
        index: its place in the request.
        score: relevance in [0, 1], or with ``raw_scores`` the model's score.
        text: as the LM read it, if it was asked for.
        doc_id: the id that the request gave, or None.
        passage: (start, end) of the characters of its best passage, where documents are scored by passages.
        spans: what made it relevant, if that was asked for.
    """

    index: int
    score: float
    text: str | None = None
    doc_id: str | None = None
    passage: tuple[int, int] | None = None
    spans: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Ranked:
    """The answer to a request.

    Attributes:
        request_id: a new one.
        model: name of the model.
        results: in the order of the request.
        best: the same, best first, without those below the threshold, ``top_n`` of them.
        input_tokens, cached_tokens: of all pairs; and of those the tokens that need not be read again.
        warnings: what was cut, in words.
    """

    request_id: str
    model: str
    results: list[Result]
    best: list[Result]
    input_tokens: int
    cached_tokens: int
    warnings: list[str]


def rank(prepared: Prepared) -> Ranked:
    """Make the answer of a request whose job has all its scores. Raises: RequestError if nobody waits for it."""
    ask, job, passages = prepared.ask, prepared.job, prepared.passages
    reranker = job.served.reranker
    counts = [1] * len(prepared.documents) if passages is None else list(map(len, passages))
    pairs = sum(counts)  # without those of empty documents, which follow
    raw, best = job.scores[:pairs], None
    if passages is not None:
        raw, best = reranker.passages.combined(raw, counts)
    shown = raw.astype(np.float64) if ask.raw_scores else _relevances(raw, prepared)
    order = np.argsort(-raw, kind="stable")  # of the scores as they are: no ties by rounding
    if ask.threshold is not None:
        order = order[shown[order] >= ask.threshold]
    order = order[: ask.top_n or None]
    spans = {} if ask.spans is None else {place: _spans(place, prepared) for place in order[:_SPANS].tolist()}
    if ask.spans is not None and len(order) > _SPANS:
        prepared.warnings.append(f"relevant_spans were found for the first {_SPANS} results only")
    results = []
    for place, document in enumerate(prepared.documents):
        given = ask.documents[place]
        won = None if passages is None or best is None else passages[place][best[place]]
        results.append(
            Result(
                place,
                float(shown[place]),
                document_text(document) if ask.return_documents else None,
                given.get("id") if isinstance(given, dict) else None,
                None if won is None else (won.start, won.end),
                spans.get(place),
            )
        )
    return Ranked(
        uuid.uuid4().hex,
        job.served.name,
        results,
        [results[place] for place in order],
        sum(job.prefix_tokens[:pairs]) + sum(job.suffix_tokens[:pairs]),
        sum(tokens for tokens, cached in zip(job.prefix_tokens[:pairs], job.cached, strict=False) if cached),
        prepared.warnings,
    )


def _spans(place: int, prepared: Prepared) -> list[dict[str, Any]]:
    """Find what made a document relevant. Raises: RequestError if nobody waits for it."""
    if prepared.given_up.is_set():
        raise RequestError("cancelled", "the client has gone")
    found = prepared.job.served.reranker.spans(
        prepared.queries[place],
        prepared.documents[place],
        instruction=prepared.job.instruction,
        **(prepared.ask.spans or {}),
    )
    return [{"start": span.start, "end": span.end, "score": span.score} for span in found]


def _relevances(scores: np.ndarray, prepared: Prepared) -> np.ndarray:
    """Compute float64 [B] in [0, 1], by the map that the adapter has."""
    reranker = prepared.job.served.reranker
    tokens = np.array(prepared.query_tokens, dtype=np.int64)
    mean, bare = scores.astype(np.float64), np.zeros(len(scores))
    if prepared.bare:
        bare = prepared.job.scores[prepared.bare].astype(np.float64)
    if not reranker.model.ranks_by_mean:
        mean, bare = mean / tokens, bare / tokens
    return reranker.calibration.relevance(mean, tokens, bare)
