"""A group of training queries as one batch of distinct queries and documents."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch

from ..prompts.pairs import PairBatch, paired_documents
from ..prompts.prompt import Document, Prompt, document_text
from .examples import DocumentSet, IdentifiedDocument, Member


def documents_of_each(members: Sequence[Member], in_batch_negatives: bool) -> Iterator[tuple[Member, list, list]]:
    """Yield (member, its positives, its negatives) for one group.

    A negative is a document of its own or, with ``in_batch_negatives``, of another query of the group, unless it is
    relevant: one of the query's positives, by id or by normalised text. A query that occurs twice has the positives
    of both.
    """
    for member in members:
        relevant = DocumentSet(d for other in members if other.same_query(member) for d in other.relevant)
        offered = list(member.negatives)
        if in_batch_negatives:
            offered += [d for other in members if other is not member for d in (*other.positives, *other.negatives)]
        yield member, _distinct(member.positives), _distinct(d for d in offered if d not in relevant)


def _distinct(documents: Iterable[IdentifiedDocument]) -> list[IdentifiedDocument]:
    seen, kept = DocumentSet(), []
    for document in documents:
        if document not in seen:
            seen.add(document)
            kept.append(document)
    return kept


class GroupCollator:
    """Makes a batch of members: the distinct pairs to score, and the tables that the losses read.

    Args:
        prompt: the model's `Prompt`.
        queries_per_group: consecutive members that form a group; 1 in evaluation.
        in_batch_negatives: whether the documents of a group are negatives of its other queries.
        taught_by: name of the loss for which every document must have a teacher score; "" for none.
        truncate_queries: whether queries that are too long are cut, instead of an error.
    """

    def __init__(
        self,
        prompt: Prompt,
        queries_per_group: int,
        in_batch_negatives: bool,
        taught_by: str = "",
        truncate_queries: bool = False,
    ) -> None:
        self.prompt, self.queries_per_group, self.in_batch_negatives = prompt, queries_per_group, in_batch_negatives
        self.taught_by, self.truncate_queries = taught_by, truncate_queries

    def __call__(self, members: Sequence[Member]) -> dict:
        """Collate members into tables over Q queries and up to M documents each.

        Returns: a dict of
            positive, mask: bool [Q, M]; which documents are relevant, and which are there.
            pair: int64 [Q, M]; the row of `PairBatch` that the score comes from.
            document: int64 [Q, M]; equal where two queries of a group meet the same document.
            teacher_scores: float32 [Q, M], NaN where there is none.
            pairs: `PairBatch`; the candidates of a query in it are the documents of its own examples.
            alone: how many of the Q queries have no document that is not relevant.
            queries: how many of the Q queries count; 0 for a batch of idle members, which still has one to run on.
        Raises: ValueError for a missing teacher score or a query that is too long.
        """
        busy = [member for member in members if not member.idle]
        queries, members = len(busy), busy or members[:1]
        distinct: dict[tuple[str, str], int] = {}  # (query, document text) -> row
        pairs: list[tuple[str, Document]] = []
        rows: list[tuple[list[int], int, int, list[float]]] = []
        own_rows: list[int] = []
        for start in range(0, len(members), self.queries_per_group):
            group = members[start : start + self.queries_per_group]
            for member, positives, negatives in documents_of_each(group, self.in_batch_negatives):
                row, own = [], DocumentSet((*member.positives, *member.negatives))
                for document in (*positives, *negatives):
                    key = member.query, document_text(document.document)
                    if key not in distinct:
                        distinct[key] = len(pairs)
                        pairs.append((member.query, document.document))
                    row.append(distinct[key])
                    if document in own:
                        own_rows.append(distinct[key])
                scores = [document.teacher_score for document in (*positives, *negatives)]
                if self.taught_by and any(map(math.isnan, scores)):
                    raise ValueError(
                        f"example {member.index}: loss={self.taught_by!r} needs a teacher score for each "
                        "document: positive_scores and negative_scores"
                    )
                rows.append((row, len(positives), start, scores))
        batch = self._encode(pairs, members)
        batch.candidates = paired_documents([batch.pairs[row] for row in own_rows], len(batch.queries))
        shape = len(rows), max(len(row) for row, *_ in rows)
        pair, document, mask, positive = (
            torch.zeros(shape, dtype=dtype) for dtype in (torch.long, torch.long, torch.bool, torch.bool)
        )
        teacher_scores = torch.full(shape, math.nan, dtype=torch.float32)
        for q, (row, num_positives, group_start, scores) in enumerate(rows):
            pair[q, : len(row)] = torch.tensor(row)
            mask[q, : len(row)] = True
            positive[q, :num_positives] = True
            teacher_scores[q, : len(row)] = torch.tensor(scores)
            # groups share nothing: a document that two of them have counts as two
            document[q, : len(row)] = torch.tensor([batch.pairs[i][1] for i in row])
            document[q] += group_start * len(batch.documents)
        return {
            "positive": positive,
            "mask": mask,
            "pair": pair,
            "document": document,
            "teacher_scores": teacher_scores,
            "pairs": batch,
            "alone": sum(len(row) == num_positives for row, num_positives, *_ in rows),
            "queries": queries,
        }

    def _encode(self, pairs: list[tuple[str, Document]], members: Sequence[Member]) -> PairBatch:
        try:
            return PairBatch.from_text(self.prompt, pairs, truncate_queries=self.truncate_queries)
        except ValueError:
            for member in members:  # a query that is too long: say whose
                try:
                    self.prompt.queries([member.query], [] if self.truncate_queries else None)
                except ValueError as error:
                    raise ValueError(f"example {member.index}: {error}") from None
            raise
