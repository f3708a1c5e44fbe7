"""Insight into scores: the clues of a pair, and a score of the clues alone."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import numpy as np

from ..prompts.prompt import Document
from .clue_similarity import ClueSimilarity
from .explain import Explanation, explain_pair
from .inputs import as_lists
from .lists import PAIRS_PER_LIST_BLOCK, ListRanker, blocks_of


class PairInspector(ListRanker):
    """Shows the clues of pairs; a base of `Reranker`, whose options it has."""

    def explain(self, query: str, document: Document, candidates: Iterable[Document] | None = None) -> Explanation:
        """Show the clues of a pair: which document tokens they are, where in the text, and with which weight.

        Args:
            query: a string.
            document: as in `rank`; a long one is cut, also with ``passages`` (give the passage to explain one).
            candidates: the query's other documents and this one, which matter with ``source="candidates"`` only.
        Returns: `Explanation`; without clues for ``clues="none"``.
        Raises: TypeError or ValueError that names what is wrong with the query or a document.
        """
        with self.model.passes(evaluating=True):
            return explain_pair(self.model, query, document, candidates, self.truncate_queries)

    def similarity(self, queries: Iterable[str], candidates: Iterable[Iterable[Document]]) -> list[list[float]]:
        """Score documents by their clues only, without running the LM, as a baseline.

        A score is the sum of the scores of a pair's clues; 0 for a pair without clues. With ``clues="top_k"`` these are
        the clues that the model chooses, with its source, filters and trained projection (their weights in `explain`);
        for other models they are the k document tokens most similar to a query token, by the filters and the similarity
        of their config. With a source "vocabulary…" a query's documents are all equal. With ``passages`` a document has
        the best of its passages' sums, their mean, or the first one's.

        Args:
            queries, candidates: as in `rank_many`.
        Returns: for each query the score of each of its documents, in their order.
        Raises: as `rank_many`.
        """
        texts, lists = as_lists("similarity", queries, candidates)
        split = None if self.passages is None else [self.passages.split(documents) for documents in lists]
        if split is not None:
            lists = [[passage.document for passages in each for passage in passages] for each in split]
        results = []
        for block in blocks_of(lists, PAIRS_PER_LIST_BLOCK):
            pairs = [(texts[i], document) for i in block for document in lists[i]]
            with self.model.passes(evaluating=True):
                batch = self.model.encode(pairs, self._lists(block, lists), self.truncate_queries)
                sums = iter(self._clue_similarity(batch).tolist() if pairs else ())
            results += [[next(sums) for _ in lists[i]] for i in block]
        if split is None or self.passages is None:
            return results
        return [
            self.passages.combined(np.array(sums), list(map(len, each)))[0].tolist()
            for sums, each in zip(results, split, strict=True)
        ]

    @cached_property
    def _clue_similarity(self) -> ClueSimilarity:
        return ClueSimilarity(self.model)
