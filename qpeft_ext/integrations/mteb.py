"""MTEB: `QPeftSearch` reranks the documents of reranking tasks."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from ..utils.optional import needs

with needs("mteb", "mteb"):
    from mteb.models.model_meta import ModelMeta

from .source import Source


class QPeftSearch:
    """A model of MTEB's kind "search", which sees all candidates at once, so that each document is read once.

    It reranks only. For a retrieval task, run a first stage with ``prediction_folder=`` and turn its predictions into
    candidates: ``task.convert_to_reranking(folder, top_k)``.

    A query's instruction, in tasks that have them, goes to the LM as `Reranker.rank_many` has it: before the query, and
    not scored.

    Args:
        reranker: a `Reranker`, an adapter, or the URL of a server, as for `source.Source`.
        name: under which MTEB keeps the results, "organisation/model"; None makes one of the adapter's name.
        revision: of the model, which MTEB keeps too: it takes results of this name and revision for those of this
            model, instead of evaluating it again. None makes a new one for each object.
        options: arguments of `Reranker.from_pretrained`, or of `RerankClient` for a URL.
        api_key: the key of the server.
        model: the name of the model that the server shall use.
    Attributes:
        mteb_model_meta: what MTEB keeps about the model.
    """

    def __init__(
        self,
        reranker: Any,
        name: str | None = None,
        revision: str | None = None,
        options: Mapping[str, Any] | None = None,
        api_key: str | None = None,
        model: str | None = None,
    ) -> None:
        self._source = Source(reranker, options, api_key, model)
        self._documents: dict[str, dict[str, str]] = {}
        adapter = model or getattr(self._source.ranker, "adapter", None) or "reranker"
        name = name or f"qpeft_ext/{re.sub(r'[^a-zA-Z0-9_.-]', '-', adapter.rstrip('/').rpartition('/')[2])}"
        revision = uuid.uuid4().hex if revision is None else revision
        self.mteb_model_meta = ModelMeta.create_empty(
            {"name": name, "revision": revision, "model_type": ["cross-encoder"], "framework": ["PyTorch"]}
        )

    def index(self, corpus: Sequence[Mapping[str, Any]], **_: Any) -> None:
        """Take the documents of a task.

        Args:
            corpus: rows with "id", "text" and perhaps "title".
        """
        self._documents = {row["id"]: {"title": row.get("title") or "", "text": row["text"] or ""} for row in corpus}

    def search(
        self,
        queries: Sequence[Mapping[str, Any]],
        *,
        top_k: int,
        top_ranked: Mapping[str, Sequence[str]] | None = None,
        **_: Any,
    ) -> dict[str, dict[str, float]]:
        """Rerank the candidates of queries.

        Args:
            queries: rows with "id", "text" and perhaps "instruction".
            top_k: how many documents of each query to return.
            top_ranked: query_id → the ids of its candidates; queries without candidates get none.
        Returns: query_id → doc_id → score.
        Raises: ValueError without candidates, or for a candidate that the corpus does not have.
        """
        if top_ranked is None:
            raise ValueError(
                "QPeftSearch: this task has no candidates to rerank; evaluate a first stage with prediction_folder=…, "
                "then call task.convert_to_reranking(folder, top_k)"
            )
        rows = {row["id"]: row for row in queries}
        ids = {query_id: list(dict.fromkeys(top_ranked.get(query_id, ()))) for query_id in rows}
        for query_id, own in ids.items():
            if unknown := [doc_id for doc_id in own if doc_id not in self._documents]:
                raise ValueError(f"QPeftSearch: the corpus lacks the candidate {unknown[0]!r} of query {query_id!r}")
        texts = [_query_text(row) for row in rows.values()]
        candidates = [[self._documents[doc_id] for doc_id in own] for own in ids.values()]
        instructions = [row.get("instruction") or None for row in rows.values()]
        ranked = self._source.rank_many(texts, candidates, top_k, instructions if any(instructions) else None)
        return {
            query_id: {own[row["corpus_id"]]: row["score"] for row in of_query}
            for (query_id, own), of_query in zip(ids.items(), ranked, strict=True)
        }


def _query_text(row: Mapping[str, Any]) -> str:
    """Return the query; of a conversation all turns, as MTEB writes them."""
    if isinstance(row["text"], str):
        return row["text"]
    turns = [turn if isinstance(turn, str) else f"{turn['role']}: {turn['content']}" for turn in row["text"]]
    return "; ".join(turns)
