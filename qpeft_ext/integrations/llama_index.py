"""LlamaIndex: `QPeftPostprocessor` reranks the nodes that a retriever found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..utils.optional import needs

with needs("llama-index-core", "llama-index"):
    from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr, SecretStr, model_serializer
    from llama_index.core.callbacks import CBEventType, EventPayload
    from llama_index.core.instrumentation import get_dispatcher
    from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle

from .source import Source

_dispatcher = get_dispatcher(__name__)


class QPeftPostprocessor(BaseNodePostprocessor):
    """A postprocessor that returns the best nodes, best first, with their new scores.

    The text of a node is what its embedding is made of (``MetadataMode.EMBED``). The nodes that are given keep their
    scores. Events of reranking start and end go to the dispatcher and to the callback manager.

    ``top_n``, ``instruction`` and ``threshold`` may be set anew; the others are of the reranker, which is opened once.

    Attributes:
        reranker: a `Reranker`, an adapter, or the URL of a server, as for `source.Source`.
        top_n: how many nodes to return.
        options: arguments of `Reranker.from_pretrained`, or of `RerankClient` for a URL.
        api_key: the key of the server; neither it nor a `Reranker` becomes part of `to_dict`: give them to
            `from_dict`.
        model: the name of the model that the server shall use.
        instruction, threshold: as for `source.Source`; with a threshold, scores are relevances between 0 and 1.
    Raises: ValueError (pydantic's) for a ``top_n`` below 1, and what `source.Source` raises.
    """

    model_config = ConfigDict(extra="forbid")

    reranker: Any = Field(frozen=True, description="A Reranker, an adapter, or the URL of a server.")
    top_n: int = Field(default=10, ge=1, description="How many nodes to return.")
    options: Mapping[str, Any] | None = Field(default=None, frozen=True, description="Arguments of the reranker.")
    api_key: SecretStr | None = Field(default=None, frozen=True, exclude=True)
    model: str | None = Field(default=None, frozen=True, description="The name of the model that the server shall use.")
    instruction: str | None = Field(default=None, description="What the LM reads between document and query.")
    threshold: float | None = Field(default=None, description="Leave out nodes whose relevance is smaller.")
    _ranker: Any = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        """Open the reranker, once."""
        super().model_post_init(context)
        key = None if self.api_key is None else self.api_key.get_secret_value()
        self._ranker = Source(self.reranker, self.options, key, self.model, self.instruction, self.threshold).ranker

    @model_serializer(mode="wrap")
    def custom_model_dump(self, handler: Any, info: Any) -> dict[str, Any]:
        """Return what LlamaIndex saves.

        Args:
            handler, info: pydantic's.
        """
        data = handler(self) | {"class_name": self.class_name()}
        if isinstance(self.reranker, Path):
            data["reranker"] = str(self.reranker)
        elif not isinstance(self.reranker, str):
            data.pop("reranker", None)
        return data

    @classmethod
    def class_name(cls) -> str:
        """Return the name under which LlamaIndex keeps this class."""
        return "QPeftPostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None:
            raise ValueError("QPeftPostprocessor: a query is needed; give query_bundle= or query_str=")
        if not nodes:
            return []
        name = self.model or str(self.reranker)
        _dispatcher.event(ReRankStartEvent(query=query_bundle, nodes=nodes, top_n=self.top_n, model_name=name))
        payload = {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: name,
            EventPayload.QUERY_STR: query_bundle.query_str,
            EventPayload.TOP_K: self.top_n,
        }
        with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
            texts = [node.node.get_content(metadata_mode=MetadataMode.EMBED) for node in nodes]
            source = Source(self._ranker, instruction=self.instruction, threshold=self.threshold)
            rows = source.rank(query_bundle.query_str, texts, self.top_n)
            best = [NodeWithScore(node=nodes[row["corpus_id"]].node, score=row["score"]) for row in rows]
            event.on_end(payload={EventPayload.NODES: best})
        _dispatcher.event(ReRankEndEvent(nodes=best))
        return best
