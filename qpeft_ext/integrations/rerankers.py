"""`QPeftRanker` for the package rerankers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

from ..utils.inputs import as_list, expect_text
from ..utils.optional import needs

with needs("rerankers", "rerankers"):
    from rerankers.documents import Document
    from rerankers.models.ranker import BaseRanker
    from rerankers.results import RankedResults, Result

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
            docs: texts, or documents of the package; they are not changed.
            doc_ids: their ids; None takes those of the documents, and the place (0, 1, …) of one that has none.
            metadata: a dict for each; None takes those of the documents.
        Returns: results with score and rank (from 1), best first, and copies of the documents.
        Raises: TypeError for a document that is no text; ValueError for as many ids or metadata as there are no docs.
        """
        one = isinstance(docs, (str, Document))
        given = [docs] if one else as_list(docs, "rank: docs", "one document goes into a list: [document]")
        documents = _documents(given, doc_ids, metadata)
        if not documents:
            return RankedResults(results=[], query=query, has_scores=True)
        texts = [document.text for document in documents]
        rows = self._source.rank(query, texts)
        results = [
            Result(document=documents[row["corpus_id"]], score=row["score"], rank=rank)
            for rank, row in enumerate(rows, start=1)
        ]
        return RankedResults(results=results, query=query, has_scores=True)


def _documents(given: list[Any], doc_ids: Any, metadata: Any) -> list[Document]:
    """Return documents with these ids and metadata; `rerankers.utils.prep_docs` fails or changes some that it gets."""
    for name, values in (("doc_ids", doc_ids), ("metadata", metadata)):
        if values is not None and len(values) != len(given):
            raise ValueError(f"rank: {len(given)} docs but {len(values)} {name}")
    documents = []
    for place, item in enumerate(given):
        document = copy(item) if isinstance(item, Document) else None
        expect_text(item if document is None else document.text, f"document {place}")
        document = document or Document(item)
        if doc_ids is not None:
            document.doc_id = doc_ids[place]
        elif document.doc_id is None:
            document.doc_id = place
        document.metadata = document.metadata if metadata is None else metadata[place]
        documents.append(document)
    return documents
