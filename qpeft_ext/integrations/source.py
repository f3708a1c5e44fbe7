"""Where a plug-in gets its scores from: a `Reranker`, an adapter, or a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..utils.inputs import kind_of
from .client import RerankClient, as_relevance


class Source:
    """The reranker that a plug-in was given, with the options of its calls.

    Without ``threshold`` a score of a `Reranker` or an adapter is a log-likelihood in nats, and one of a server is what
    it sends, a relevance between 0 and 1. With a threshold, 0 for instance, both are relevances.

    Args:
        reranker: a `Reranker`, or another object with its `rank`, `rank_many` and `predict`; the folder or Hub id of an
            adapter; or the URL of a server, ``http://…`` or ``https://…``.
        options: for an adapter, arguments of `Reranker.from_pretrained` such as ``base_model``; for a URL, arguments of
            `RerankClient` such as ``timeout``.
        api_key: for a URL, the key of the server.
        model: for a URL, the name of the model that the server shall use.
        instruction: what the LM reads between document and query, such as "Find a passage that refutes the claim."
        threshold: leave out documents whose relevance is smaller; 0 keeps all.
    Attributes:
        ranker: the `Reranker`, the `RerankClient`, or the object that was given.
    Raises: TypeError for another kind of reranker; ValueError for arguments that do not belong to it, or a threshold
        that is not between 0 and 1; what `Reranker.from_pretrained` raises.
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
        self.instruction, self.threshold = instruction, as_relevance(threshold)
        self.ranker = _open(reranker, options, api_key, model)

    def rank(self, query: str, documents: Sequence[Any], top_k: int | None = None) -> list[dict[str, Any]]:
        """Rank the documents of one query, best first.

        Args:
            query: a string.
            documents: strings, or dicts with "text" and perhaps "title".
            top_k: how many to return; None returns all.
        Returns: a dict for each document: "corpus_id", its place in ``documents``, and "score".
        """
        return _scored(self.ranker.rank(query, documents, top_k, **self._asked()))

    def rank_many(
        self,
        queries: Sequence[str],
        candidates: Sequence[Sequence[Any]],
        top_k: int | None = None,
        instructions: Sequence[str | None] | None = None,
    ) -> list[list[dict[str, Any]]]:
        """Rank the documents of many queries.

        Args:
            queries, candidates, top_k: as for `Reranker.rank_many`.
            instructions: one for each query, instead of the one for all.
        Returns: for each query what `rank` returns.
        """
        asked = self._asked() | ({} if instructions is None else {"instruction": instructions})
        return [_scored(rows) for rows in self.ranker.rank_many(queries, candidates, top_k, **asked)]

    def predict(self, pairs: Sequence[tuple[str, Any]]) -> list[float]:
        """Score (query, document) pairs, in their order; none is left out."""
        asked = {} if self.instruction is None else {"instruction": self.instruction}
        scores = self.ranker.predict(pairs, **asked)
        if self.threshold is not None and not isinstance(self.ranker, RerankClient):
            scores = self.ranker.relevance([query for query, _ in pairs], scores, **asked)
        return [float(score) for score in scores]

    def _asked(self) -> dict[str, Any]:
        """Return the options of a call that were given."""
        given = {"instruction": self.instruction, "threshold": self.threshold}
        return {name: value for name, value in given.items() if value is not None}


def _scored(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"corpus_id": row["corpus_id"], "score": row.get("relevance", row["score"])} for row in rows]


def _open(reranker: Any, options: Mapping[str, Any] | None, api_key: str | None, model: str | None) -> Any:
    if isinstance(reranker, str) and reranker.startswith(("http://", "https://")):
        if twice := {"api_key", "model"} & set(options or {}):
            raise ValueError(f"give {' and '.join(sorted(twice))} itself, not among the options")
        return RerankClient(reranker, api_key=api_key, model=model, **dict(options or {}))
    given = [name for name, value in (("api_key", api_key), ("model", model)) if value is not None]
    if given:
        raise ValueError(f"{' and '.join(given)} need the URL of a server as the reranker, got {kind_of(reranker)}")
    if isinstance(reranker, (str, Path)):
        from ..ranking.reranker import Reranker

        return Reranker.from_pretrained(reranker, **dict(options or {}))
    if not all(callable(getattr(reranker, name, None)) for name in ("rank", "rank_many", "predict")):
        raise TypeError(
            "the reranker must be a Reranker, the path or Hub id of an adapter, or the URL of a server, "
            f"got {kind_of(reranker)}"
        )
    if options:
        raise ValueError("options are for an adapter that is loaded here; the reranker that was given has its own")
    return reranker
