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
        spans: what made it relevant, if that was asked for.
    """

    index: int
    score: float
    text: str | None = None
    doc_id: str | None = None
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
    ask, job = prepared.ask, prepared.job
    raw = job.scores
    relevances = _relevances(prepared)
    shown = raw if ask.raw_scores else relevances
    texts = [document_text(document) if ask.return_documents else None for _, document in job.pairs]
    ids = [document.get("id") if isinstance(document, dict) else None for document in ask.documents]
    results = [
        Result(place, float(score), text, doc_id)
        for place, (score, text, doc_id) in enumerate(zip(shown, texts, ids, strict=True))
    ]
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


def _relevances(prepared: Prepared) -> np.ndarray:
    """Compute float64 [B] in [0, 1]."""
    job, tokens = prepared.job, np.array(prepared.query_tokens, dtype=np.int64)
    mean = job.scores.astype(np.float64)
    if not job.served.reranker.model.ranks_by_mean:
        mean = mean / tokens
    return relevance(mean, tokens)
