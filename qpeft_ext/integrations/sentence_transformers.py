"""sentence-transformers: `QPeftCrossEncoder` is evaluated by its evaluators of cross-encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .client import RerankClient
from .source import Source


class QPeftCrossEncoder:
    """A `Reranker` with what the evaluators of sentence-transformers use of a `CrossEncoder` besides `predict`.

    Those are `CrossEncoderRerankingEvaluator` and others of ``sentence_transformers.cross_encoder.evaluation``, which
    keep their figures in a model card.

    Args:
        reranker: a `Reranker` or an adapter, as for `source.Source`; not the URL of a server.
        options: arguments of `Reranker.from_pretrained`.
    Attributes:
        num_labels: 1, one score a pair.
        model_card_data: takes what an evaluator keeps in a model card; its ``metrics`` has the last of each evaluator,
            by the evaluator's name.
    Raises: ValueError for an URL; what `source.Source` raises.
    """

    num_labels = 1

    def __init__(self, reranker: Any, options: Mapping[str, Any] | None = None) -> None:
        self._ranker = Source(reranker, options).ranker
        if isinstance(self._ranker, RerankClient):
            raise ValueError(f"QPeftCrossEncoder: expected a Reranker or an adapter, got the URL {reranker}")
        self.model_card_data = _CardData()

    def predict(self, inputs: Sequence[Any], **options: Any) -> Any:
        """Score pairs.

        Args:
            inputs: pairs as for `Reranker.predict`.
            options: as for `Reranker.predict`, such as ``batch_size``, ``convert_to_tensor`` and ``prompt_name``.
        Returns: what `Reranker.predict` returns.
        """
        return self._ranker.predict(inputs, **options)

    def rank(self, query: str, documents: Sequence[Any], top_k: int | None = None, **options: Any) -> list[dict]:
        """Rank documents, as `Reranker.rank`.

        Args:
            query, documents, top_k, options: as for `Reranker.rank`.
        """
        return self._ranker.rank(query, documents, top_k, **options)


class _CardData:
    def __init__(self) -> None:
        self.metrics: dict[str, dict[str, Any]] = {}

    def set_evaluation_metrics(self, evaluator: Any, metrics: dict[str, Any], epoch: int = 0, step: int = 0) -> None:
        self.metrics[getattr(evaluator, "name", "") or type(evaluator).__name__] = metrics
