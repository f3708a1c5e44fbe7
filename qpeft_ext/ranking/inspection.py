"""Insight into scores: the clues of a pair, and a score of the clues alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property

import numpy as np

from ..prompts.prompt import Document, document_text, expect_query
from ..prompts.sentences import sentence_spans
from ..utils.inputs import whole_number
from ..utils.progress import progress_bar
from .clue_similarity import ClueSimilarity
from .explain import Explanation, explain_pair, text_start
from .inputs import as_lists, as_threshold
from .lists import PAIRS_PER_LIST_BLOCK, ListRanker, blocks_of
from .spans import (
    Place,
    Span,
    best_spans,
    clue_phrases,
    evidence_of_texts,
    own_text,
    shares,
    visible_slots,
    weighed,
)


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

    def spans(
        self,
        query: str,
        document: Document,
        *,
        threshold: float = 0.1,
        max_spans: int | None = None,
        likelihood: bool | None = None,
        instruction: str | None = None,
    ) -> list[Span]:
        """Find the parts of a document that made it relevant.

        A model with clues of the document gives the words and phrases that its clues are in. With ``likelihood`` the LM
        says which sentences matter: it reads the query with each sentence alone and without it, by hiding the others in
        the keys and values of the document, which are computed once. Phrases are then weighed by their sentence. A
        model without clues gives sentences.

        Args:
            query: a string.
            document: as in `rank`.
            threshold: leave out spans whose score is smaller.
            max_spans: how many at most; None for all.
            likelihood: whether the LM weighs sentences, two suffixes for each; None for models without clues only.
            instruction: as in `predict`; only ``likelihood`` reads it.
        Returns: the spans, best first; with ``passages`` those of the best passage. Scores of all, also of those that
            are left out, add up to 1.
        Raises: TypeError or ValueError that names the argument, or what is wrong with query or document.
        """
        expect_query(query, "spans: the query")
        document_text(document, "spans: the document")
        share, most = as_threshold("spans", threshold), whole_number(max_spans, "spans: max_spans")
        document, shift = self._best_passage(query, document, instruction)
        text, phrases = own_text(document), []
        if self.model.clues is not None and self.model.qpeft_config.source == "document":
            phrases = clue_phrases(self.explain(query, document), text)
        if likelihood or (likelihood is None and not phrases):
            sentences = self._sentences(query, document, instruction)
            phrases = weighed(phrases, sentences) if phrases else sentences
        spans = best_spans(text, phrases, share or 0.0, most)
        return [replace(span, start=span.start + shift, end=span.end + shift) for span in spans]

    def _best_passage(self, query: str, document: Document, instruction: str | None) -> tuple[Document, int]:
        """Return the best passage as it was scored, with its title, and where it begins in the document's own text.

        Without ``passages`` that is the whole document.
        """
        if self.passages is None:
            return document, 0
        ((row,),) = self._ranked(
            [query], [[document]], None, False, None, None if instruction is None else [instruction]
        )
        splitter = self.passages.splitter
        found = splitter.passages(document, *splitter.splits([document]))
        passage = next(passage for passage in found if (passage.start, passage.end) == row["passage"])
        return passage.document, passage.start

    def _sentences(self, query: str, document: Document, instruction: str | None) -> list[tuple[Place, float]]:
        """Give the sentences of a document, and the share of each in its relevance; those that were cut have none."""
        model, text = self.model, own_text(document)
        places = sentence_spans(text)
        if len(places) < 2:
            return [(place, 1.0) for place in places]
        given = None if instruction is None else [instruction]
        if model.engine.why_not_cached or model.prompt.query_first or self.path != "document_first":
            with progress_bar(total=0, unit="pair", desc="spans", show=False) as bar:
                evidence = evidence_of_texts(
                    lambda texts: self._score([(query, part) for part in texts], bar, None, None,
                                              given and given * len(texts)), document, places)  # fmt: skip
        else:
            with model.passes(evaluating=True):
                batch = model.encode([(query, document)], None, self.truncate_queries, given)
                start = text_start(document)
                visible, kept = visible_slots(batch.documents[0], model.prompt.offsets(document), places, start)
                if not kept:  # the title leaves no room for the text
                    return []
                places = [places[s] for s in kept]
                found = self._within_memory(
                    lambda tokens: model.score_views(batch, visible, self.cache, tokens, self.deterministic)
                )
            alone, without = found.double().cpu().numpy().reshape(2, -1)
            evidence = alone - without
        if model.ranks_by_mean:  # evidence is in nats of the whole query
            (ids,) = model.prompt.queries([query], [])
            evidence = evidence * model.scored_tokens(ids)
        return list(zip(places, shares(evidence).tolist(), strict=True)) if places else []

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
