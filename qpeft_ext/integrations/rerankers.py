"""`QPeftRanker` for the package rerankers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..utils.optional import needs

with needs("rerankers", "rerankers"):
    from rerankers.documents import Document
    from rerankers.models.ranker import BaseRanker
    from rerankers.results import RankedResults, Result
    from rerankers.utils import prep_docs

from .source import Source


class QPeftRanker(BaseRanker):
    """A ranker with the methods of the package rerankers.

    Args:
        model_name_or_path: a `Reranker`, an adapter, or the URL of a server, as for `source.Source`.
        verbose: accepted, without effect.
        options: arguments of `Reranker.from_pretrained`, or of `RerankClient` for a URL.
        api_key: the key of the server.
        model: the name of the model that the server shall use.
        instruction, threshold: as for `source.Source`; with a threshold, scores are relevances between 0 and 1.
    """

    def __init__(
        self,
        model_name_or_path: Any,
        verbose: int = 0,
        options: Mapping[str, Any] | None = None,
        api_key: str | None = None,
        model: str | None = None,
        instruction: str | None = None,
        threshold: float | None = None,
    ) -> None:
        self.verbose = verbose
        self._source = Source(model_name_or_path, options, api_key, model, instruction, threshold)

    def score(self, query: str, doc: str) -> float:
        """Score one document."""
        return self._source.predict([(query, doc)])[0]

    def rank(
        self,
        query: str,
        docs: str | Document | Sequence[str] | Sequence[Document],
        doc_ids: Sequence[str] | Sequence[int] | None = None,
        metadata: Sequence[dict] | None = None,
    ) -> RankedResults:
        """Rank documents.

        Args:
            query: a string.
            docs: texts, or documents of the package.
            doc_ids: their ids; None takes those of the documents, else 0, 1, ….
            metadata: a dict for each text.
        Returns: results with score and rank (from 1), best first.
        """
        given = [docs] if isinstance(docs, (str, Document)) else list(docs)
        if not given:
            return RankedResults(results=[], query=query, has_scores=True)
        documents = prep_docs(given, doc_ids, metadata)
        texts = [document.text for document in documents]
        rows = self._source.rank(query, texts)
        results = [
            Result(document=documents[row["corpus_id"]], score=row["score"], rank=rank)
            for rank, row in enumerate(rows, start=1)
        ]
        return RankedResults(results=results, query=query, has_scores=True)
