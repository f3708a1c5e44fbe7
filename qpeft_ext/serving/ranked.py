"""`Ranked`: the scores of a request, sorted, as the bodies of responses need them."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..prompts.prompt import document_text
from .prepare import Prepared
from .relevance import relevance


@dataclass(frozen=True)
class Result:
    """One document of a response.

    Attributes:
        index: its place in the request.
        score: relevance in [0, 1], or with ``raw_scores`` the log-likelihood in nats.
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
    """Make the answer of a request whose job has all its scores."""
    ask, job, passages = prepared.ask, prepared.job, prepared.passages
    raw, best = job.scores, None
    if passages is not None:
        raw, best = job.served.reranker.passages.combined(raw, list(map(len, passages)))
    shown = raw if ask.raw_scores else _relevances(raw, prepared)
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
            )
        )
    order = np.argsort(-raw, kind="stable")  # of the scores as they are: no ties by rounding
    if ask.threshold is not None:
        order = order[shown[order] >= ask.threshold]
    return Ranked(
        uuid.uuid4().hex,
        job.served.name,
        results,
        [results[place] for place in order[: ask.top_n or None]],
        job.tokens,
        sum(tokens for tokens, cached in zip(job.prefix_tokens, job.cached, strict=True) if cached),
        prepared.warnings,
    )


def _relevances(scores: np.ndarray, prepared: Prepared) -> np.ndarray:
    """Compute float64 [B] in [0, 1]."""
    tokens = np.array(prepared.query_tokens, dtype=np.int64)
    mean = scores.astype(np.float64)
    if not prepared.job.served.reranker.model.ranks_by_mean:
        mean = mean / tokens
    return relevance(mean, tokens)
