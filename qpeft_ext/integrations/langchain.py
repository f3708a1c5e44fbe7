"""LangChain: `QPeftCompressor` reranks what a retriever found, `QPeftCrossEncoder` scores pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..utils.optional import needs

with needs("langchain-core", "langchain"):
    from langchain_core.callbacks import Callbacks
    from langchain_core.cross_encoders import BaseCrossEncoder
    from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import ConfigDict, Field, PrivateAttr, SecretStr

from .source import Source


class QPeftCompressor(BaseDocumentCompressor):
    """A compressor that returns the best documents, best first, with their scores.

    Each returned document is a copy with its score as ``metadata["relevance_score"]``. Equal scores keep the order of
    the documents that were given.

    ``top_n``, ``instruction`` and ``threshold`` may be set anew; the others are of the reranker, which is opened once.

    Attributes:
        reranker: a `Reranker`, an adapter, or the URL of a server, as for `source.Source`.
        top_n: how many documents to return; None returns all.
        options: arguments of `Reranker.from_pretrained`, or of `RerankClient` for a URL.
        api_key: the key of the server; it is not shown in ``repr``.
        model: the name of the model that the server shall use.
        instruction, threshold: as for `source.Source`; with a threshold, scores are relevances between 0 and 1.
    Raises: ValueError (pydantic's) for a ``top_n`` below 1, and what `source.Source` raises.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    reranker: Any = Field(frozen=True)
    top_n: int | None = Field(default=None, ge=1)
    options: Mapping[str, Any] | None = Field(default=None, frozen=True)
    api_key: SecretStr | None = Field(default=None, frozen=True)
    model: str | None = Field(default=None, frozen=True)
    instruction: str | None = None
    threshold: float | None = None
    _ranker: Any = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        """Open the reranker, once."""
        super().model_post_init(context)
        key = None if self.api_key is None else self.api_key.get_secret_value()
        self._ranker = Source(self.reranker, self.options, key, self.model, self.instruction, self.threshold).ranker

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Rank documents.

        Args:
            documents: what the retriever found; they are not changed.
            query: a string.
            callbacks: not used.
        Returns: the best ``top_n`` as copies, best first.
        """
        texts = [document.page_content for document in documents]
        source = Source(self._ranker, instruction=self.instruction, threshold=self.threshold)
        rows = source.rank(query, texts, self.top_n)
        return [_scored(documents[row["corpus_id"]], row["score"]) for row in rows]


def _scored(document: Document, score: float) -> Document:
    return document.model_copy(update={"metadata": {**document.metadata, "relevance_score": score}})


class QPeftCrossEncoder(BaseCrossEncoder):
    """A cross-encoder, for LangChain's own `CrossEncoderReranker` and whatever else takes one.

    Args:
        reranker: a `Reranker`, an adapter, or the URL of a server, as for `source.Source`.
        options: arguments of `Reranker.from_pretrained`, or of `RerankClient` for a URL.
        api_key: the key of the server.
        model: the name of the model that the server shall use.
        instruction, threshold: as for `source.Source`; with a threshold, scores are relevances between 0 and 1.
    """

    def __init__(
        self,
        reranker: Any,
        options: Mapping[str, Any] | None = None,
        api_key: str | None = None,
        model: str | None = None,
        instruction: str | None = None,
        threshold: float | None = None,
    ) -> None:
        self._source = Source(reranker, options, api_key, model, instruction, threshold)

    def score(self, text_pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Score (query, document) pairs, in their order."""
        pairs = [(query, document) for query, document in text_pairs]
        return self._source.predict(pairs)
