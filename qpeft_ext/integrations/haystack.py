"""Haystack 3: the component `QPeftRanker`; import it from ``haystack_integrations.components.rankers.qpeft``."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

from ..utils.inputs import as_list, kind_of
from ..utils.optional import needs

with needs("haystack-ai", "haystack"):
    from haystack import Document, component, default_from_dict, default_to_dict
    from haystack.utils import Secret

from .source import Source

_OPENING = Lock()  # one for all components, since a component with a lock could not be copied


@component
class QPeftRanker:
    """A ranker that returns the best documents, best first, with their scores.

    The returned documents are copies; of documents with the same id the first is kept.

    Args:
        reranker: an adapter, the URL of a server, or a `Reranker`, as for `source.Source`. With a `Reranker` in memory
            the pipeline cannot be saved.
        top_k: how many documents to return.
        meta_fields_to_embed: names of metadata that stand before the text.
        embedding_separator: what stands between these and the text.
        options: arguments of `Reranker.from_pretrained`, or of `RerankClient` for a URL.
        api_key: the key of the server, such as ``Secret.from_env_var("QPEFT_API_KEY")``.
        model: the name of the model that the server shall use.
        instruction, threshold: as for `source.Source`; with a threshold, scores are relevances between 0 and 1.
    Raises: ValueError for a ``top_k`` below 1; TypeError for names that are no list, or a key that is no Secret.
    """

    # Pipelines are saved with this name, and Haystack loads the modules below `haystack_integrations` only
    __module__ = "haystack_integrations.components.rankers.qpeft"

    def __init__(
        self,
        reranker: Any,
        top_k: int = 10,
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
        options: Mapping[str, Any] | None = None,
        api_key: Secret | None = None,
        model: str | None = None,
        instruction: str | None = None,
        threshold: float | None = None,
    ) -> None:
        self.reranker, self.options, self.api_key, self.model = reranker, options, api_key, model
        self.instruction, self.threshold = instruction, threshold
        self.top_k = _expect_top_k(top_k)
        self.meta_fields_to_embed = as_list(
            meta_fields_to_embed or [], "QPeftRanker: meta_fields_to_embed", "one name goes into a list: [name]"
        )
        self.embedding_separator = embedding_separator
        if api_key is not None and not isinstance(api_key, Secret):
            raise TypeError("QPeftRanker: api_key must be a Secret, such as Secret.from_env_var('QPEFT_API_KEY')")
        self._source: Source | None = None

    def warm_up(self) -> None:
        """Load the adapter, unless it is loaded."""
        self._open()

    def close(self) -> None:
        """Let go of what `warm_up` has loaded."""
        self._source = None

    def _open(self) -> Source:
        with _OPENING:  # `run_async` runs in threads, of which the first ones would each load the adapter
            source = self._source
            if source is None:
                key = None if self.api_key is None else self.api_key.resolve_value()
                source = Source(self.reranker, self.options, key, self.model, self.instruction, self.threshold)
                self._source = source
        return source

    @component.output_types(documents=list[Document])
    def run(self, query: str, documents: list[Document], top_k: int | None = None) -> dict[str, list[Document]]:
        """Rank documents.

        Args:
            query: a string.
            documents: what a retriever found; they are not changed.
            top_k: used instead of the component's.
        Returns: the best documents, under "documents".
        Raises: ValueError for a ``top_k`` below 1.
        """
        top_k = self.top_k if top_k is None else _expect_top_k(top_k)
        distinct: dict[str, Document] = {}
        for document in documents:
            distinct.setdefault(document.id, document)
        kept = list(distinct.values())
        if not kept:
            return {"documents": []}
        texts = [self._text(document) for document in kept]
        rows = self._open().rank(query, texts, top_k)
        return {"documents": [replace(kept[row["corpus_id"]], score=row["score"]) for row in rows]}

    @component.output_types(documents=list[Document])
    async def run_async(
        self, query: str, documents: list[Document], top_k: int | None = None
    ) -> dict[str, list[Document]]:
        """Rank documents in a thread, as `run`.

        Args:
            query, documents, top_k: as for `run`.
        """
        return await asyncio.to_thread(self.run, query, documents, top_k)

    def _text(self, document: Document) -> str:
        fields = [str(document.meta[name]) for name in self.meta_fields_to_embed if document.meta.get(name)]
        return self.embedding_separator.join([*fields, document.content or ""])

    def to_dict(self) -> dict[str, Any]:
        """Return the component as a dict for `Pipeline.dumps`. Raises: ValueError for a `Reranker` in memory."""
        if not isinstance(self.reranker, (str, Path)):
            raise ValueError(
                "QPeftRanker: a Reranker in memory cannot be saved in a pipeline; give the adapter's path or a URL, "
                f"got {kind_of(self.reranker)}"
            )
        return default_to_dict(
            self,
            reranker=str(self.reranker),
            top_k=self.top_k,
            meta_fields_to_embed=self.meta_fields_to_embed,
            embedding_separator=self.embedding_separator,
            options=None if self.options is None else dict(self.options),
            api_key=self.api_key,
            model=self.model,
            instruction=self.instruction,
            threshold=self.threshold,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> QPeftRanker:
        """Make the component of what `to_dict` returns.

        Args:
            data: the dict.
        """
        return default_from_dict(cls, data)


def _expect_top_k(top_k: int) -> int:
    if top_k <= 0:
        raise ValueError(f"QPeftRanker: top_k must be at least 1, got {top_k}")
    return top_k
