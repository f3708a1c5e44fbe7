"""Where a plug-in gets its scores from: a `Reranker`, an adapter, or a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..utils.inputs import kind_of
from .client import RerankClient


class Ranker(Protocol):
    """The part of `Reranker` that plug-ins use; `RerankClient` has it too."""

    def rank(
        self, query: str, documents: Sequence, top_k: int | None = None, *, instruction: str | None = None
    ) -> list[dict[str, Any]]: ...

    def rank_many(
        self,
        queries: Sequence[str],
        candidates: Sequence[Sequence],
        top_k: int | None = None,
        *,
        instruction: str | Sequence[str | None] | None = None,
    ) -> list[list[dict[str, Any]]]: ...

    def predict(self, pairs: Sequence, *, instruction: str | None = None) -> Any: ...


def open_ranker(
    reranker: Any,
    options: Mapping[str, Any] | None = None,
    api_key: str | None = None,
    model: str | None = None,
) -> Ranker:
    """Open what a plug-in was given as its reranker.

    Args:
        reranker: a `Reranker`, or another object with its `rank`, `rank_many` and `predict`; the folder or Hub id of an
            adapter; or the URL of a server, ``http://…`` or ``https://…``.
        options: for an adapter, arguments of `Reranker.from_pretrained` such as ``base_model``; for a URL, arguments of
            `RerankClient` such as ``timeout``.
        api_key: for a URL, the key of the server.
        model: for a URL, the name of the model that the server shall use.
    Returns: an object with `rank`, `rank_many` and `predict`. In this process a score is a log-likelihood in nats; from
        a server it is the relevance between 0 and 1 that the server sends.
    Raises: TypeError for anything else; ValueError for arguments that do not belong to what is given; what
        `Reranker.from_pretrained` raises.
    """
    if isinstance(reranker, str) and reranker.startswith(("http://", "https://")):
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
