"""`Ask`: what a request asks for, whichever API it speaks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

DocumentRecord = dict[str, Any]  # "text" and "title", or "id" for a text of the corpus


@dataclass
class Ask:
    """Pairs to score.

    Attributes:
        query_field, document_field: the fields of the body that they came in, for errors.
        queries: one for all documents, or one for each.
        documents: texts or records, at least one.
        model: name of the model; None takes the first.
        top_n: results wanted; None or 0: all.
        max_tokens_per_document, max_tokens_per_query: limits below those of the model.
        max_tokens_per_prompt: limit for document and query together.
        cut_left: whether the client wants long documents to lose their beginning, which is refused.
        raw_scores: the model's scores (log-likelihoods of the query in nats, by default), instead of relevances.
        threshold: results with a smaller relevance are left out.
        return_documents: whether results carry the text.
        instruction: what makes a document relevant, in words for the LM.
        spans: None, or options of the spans that made a document relevant.
    """

    query_field: str
    document_field: str
    queries: list[str]
    documents: list[str | DocumentRecord]
    model: str | None = None
    top_n: int | None = None
    max_tokens_per_document: int | None = None
    max_tokens_per_query: int | None = None
    max_tokens_per_prompt: int | None = None
    cut_left: bool = False
    raw_scores: bool = False
    threshold: float | None = None
    return_documents: bool = False
    instruction: str | None = None
    spans: dict[str, Any] | None = field(default=None)
