"""PyTerrier: `QPeftTransformer` reranks a frame of results, `to_pyterrier` makes one of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..formats.trec import Run
from ..utils.inputs import short
from ..utils.optional import needs

with needs("pyterrier", "pyterrier"):
    import pandas as pd
    import pyterrier as pt

from .source import Source


class QPeftTransformer(pt.Transformer):
    """A transformer of result frames: it needs the columns qid, query, docno and the texts, and gives score and rank.

    Passes are formed over all queries of a frame, so a frame with many queries is faster than a frame for each. For
    passages of long documents put ``pt.text.sliding("text", prepend_attr=None)`` before it and
    ``pt.text.max_passage()`` after it.

    Args:
        reranker: a `Reranker`, an adapter, or the URL of a server, as for `source.Source`.
        text_field: the column of the texts.
        title_field: the column of the titles, if there are any; a missing value is no title.
        options: arguments of `Reranker.from_pretrained`, or of `RerankClient` for a URL.
        api_key: the key of the server.
        model: the name of the model that the server shall use.
        instruction, threshold: as for `source.Source`; with a threshold, scores are relevances between 0 and 1.
    """

    def __init__(
        self,
        reranker: Any,
        text_field: str = "text",
        title_field: str | None = None,
        options: Mapping[str, Any] | None = None,
        api_key: str | None = None,
        model: str | None = None,
        instruction: str | None = None,
        threshold: float | None = None,
    ) -> None:
        self.reranker, self.text_field, self.title_field = reranker, text_field, title_field
        self._source = Source(reranker, options, api_key, model, instruction, threshold)

    def __repr__(self) -> str:
        return f"QPeftTransformer({self.reranker!r})"

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Rank each query's documents.

        Args:
            inp: a frame of results; it is not changed.
        Returns: its rows with new columns score and rank (from 0), query after query, best first; equal scores keep
            their order.
        Raises: KeyError for a missing column, PyTerrier's own kind of it; ValueError for a row without a qid, or a qid
            with several queries.
        """
        fields = [self.text_field, *([] if self.title_field is None else [self.title_field])]
        pt.validate.result_frame(inp, extra_columns=["query", *fields], context=self)
        table = inp.drop(columns=["score", "rank"], errors="ignore").reset_index(drop=True)
        if (missing := table["qid"].isna()).any():
            raise ValueError(f"QPeftTransformer: row {missing.argmax()} of the frame has no qid")
        groups, queries = [], []
        for qid, group in table.groupby("qid", sort=False):
            if group["query"].nunique(dropna=False) > 1:
                texts = " and ".join(map(short, group["query"].unique()[:2]))
                raise ValueError(f"QPeftTransformer: the qid {qid!r} has several queries: {texts}")
            groups.append(group.index)
            queries.append(group["query"].iloc[0])
        documents = [[self._document(table, place) for place in places] for places in groups]
        ranked = self._source.rank_many(queries, documents)
        order, scores = [], []
        for places, rows in zip(groups, ranked, strict=True):
            order += [places[row["corpus_id"]] for row in rows]
            scores += [row["score"] for row in rows]
        table = table.loc[order].reset_index(drop=True)
        table["score"] = pd.Series(scores, dtype="float64")
        return pt.model.add_ranks(table)

    def _document(self, table: pd.DataFrame, place: int) -> str | dict[str, str]:
        text = table[self.text_field][place]
        if self.title_field is None:
            return text
        title = table[self.title_field][place]
        return {"title": "" if pd.isna(title) else title, "text": text}

    def schematic(self, *, input_columns: list[str] | None = None) -> dict[str, str]:
        """Describe the transformer for PyTerrier's drawings.

        Args:
            input_columns: columns of the input, which make no difference.
        """
        return {"label": "Q-PEFT", "help_url": "https://arxiv.org/abs/2404.04522"}


def to_pyterrier(run: Run, queries: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Make a frame of results of a run, as PyTerrier has them.

    Args:
        run: query_id → [(doc_id, score), …], best first, as `read_run` gives.
        queries: query_id → text, for the column query; None leaves it out.
    Returns: a frame with the columns qid, docno, score, rank (from 0) and perhaps query.
    Raises: ValueError if a query of the run has no text.
    """
    missing = [] if queries is None else [query_id for query_id in run if query_id not in queries]
    if missing:
        raise ValueError(f"to_pyterrier: the queries have no text for {missing[0]!r} ({len(missing)} of {len(run)})")
    rows = [
        (query_id, doc_id, score, rank)
        for query_id, ranking in run.items()
        for rank, (doc_id, score) in enumerate(ranking)
    ]
    frame = pd.DataFrame(rows, columns=["qid", "docno", "score", "rank"])
    frame = frame.astype({"qid": object, "docno": object, "score": "float64", "rank": "int64"})
    if queries is not None:
        frame["query"] = frame["qid"].map(dict(queries))
    return frame
