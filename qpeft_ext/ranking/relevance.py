"""Relevances in [0, 1] of scores, by the model's calibration, and rankings without what is below a threshold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ..evaluation.calibration import Calibration, calibrate, default_calibration
from ..prompts.prompt import Document
from ..utils.inputs import as_list
from ..utils.words import counted
from .bare_scores import BareScores
from .inputs import as_instructions, as_lists
from .inspection import PairInspector

_QUERIES_KEPT = 4096  # whose score behind an empty document is kept between calls


class RelevanceRanker(PairInspector):
    """Gives scores a meaning that does not depend on the query; a base of `Reranker`, whose options it has."""

    @cached_property
    def calibration(self) -> Calibration:
        """The map from scores to relevances: the adapter's own, else `default_calibration` of its score and LM."""
        stored = self.model.qpeft_config.calibration
        return self._default_calibration if stored is None else Calibration.from_dict(stored)

    @property
    def _default_calibration(self) -> Calibration:
        config = self.model.qpeft_config
        return default_calibration(config.score, config.max_grade, config.base_model_name_or_path or "")

    @property
    def reads_bare_queries(self) -> bool:
        """True if a relevance needs the score of its query behind an empty document."""
        return self.calibration.gain > 0

    def relevance(
        self,
        queries: Sequence[str],
        scores: Sequence[float] | np.ndarray,
        instruction: str | Sequence[str | None] | None = None,
    ) -> np.ndarray:
        """Map scores to relevances in [0, 1]: an estimate of the share of such pairs that are relevant.

        It depends on the pair alone, not on the other documents of a call, and documents of one query keep the order of
        their scores. For each query that is new, the LM reads it once more, behind an empty document, unless the map
        does without (``reads_bare_queries``): that of log-odds which nobody has calibrated is their logistic.

        Args:
            queries: the query of each score.
            scores: of `predict`, `rank` or `rank_many`, [B].
            instruction: as for `predict`, with which the scores were computed.
        Returns: float64 [B].
        Raises: TypeError for a single query or score; ValueError for another number of scores than of queries, or a
            score that is no finite number.
        """
        queries = as_list(queries, "relevance: queries", "one query goes into a list: [query]")
        scores = np.array(as_list(scores, "relevance: scores", "one score goes into a list: [score]"), dtype=np.float64)
        if len(queries) != len(scores):
            each = f"{counted(len(queries), 'queries')} but {counted(len(scores), 'scores')}"
            raise ValueError(f"relevance: {each}; give each score its query")
        if not np.isfinite(scores).all():
            place = int(np.argmin(np.isfinite(scores)))
            raise ValueError(f"relevance: score {place} must be a finite number, got {scores[place]}")
        instructions = as_instructions("relevance", instruction, len(queries)) or [None] * len(queries)
        keys = list(zip(queries, instructions, strict=True))
        return self.calibration.relevance(*self._inputs(keys, scores, self.reads_bare_queries))

    def calibrate(
        self,
        queries: Iterable[str],
        candidates: Iterable[Iterable[Document]],
        relevant: Sequence[Sequence[bool]],
        data: str = "given data",
    ) -> Calibration:
        """Fit relevances to judged documents; `adapters.files.save_calibration` stores the result in an adapter.

        Args:
            queries, candidates: as for `rank_many`; the candidates should be as those that will be ranked, for instance
                the first 20 of the same first stage.
            relevant: for each query, for each of its candidates whether it is relevant.
            data: name of the data, for people.
        Returns: the map; this reranker keeps the one that it has.
        Raises: as `rank_many`; ValueError for other lengths of ``relevant``, and where a half of the queries has no
            relevant document.
        """
        texts, lists = as_lists("calibrate", queries, candidates)
        if [len(row) for row in relevant] != [len(row) for row in lists]:
            raise ValueError("calibrate: relevant must have a value for each candidate of each query")
        ranked = self._ranked(texts, lists, None, None, None)
        query = np.array([q for q, rows in enumerate(ranked) for _ in rows], dtype=np.int64)
        truth = np.array([relevant[q][row["corpus_id"]] for q, rows in enumerate(ranked) for row in rows], dtype=bool)
        scores = np.array([row["score"] for rows in ranked for row in rows])
        mean, tokens, bare = self._inputs([(texts[q], None) for q in query], scores, with_bare=True)
        return calibrate(mean, tokens, truth, bare, query, data, self._default_calibration)

    def _inputs(
        self, keys: Sequence[tuple[str, str | None]], scores: np.ndarray, with_bare: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Give what `Calibration.relevance` takes, for the queries and instructions of scores: three times [B].

        Args:
            keys: (query, instruction) of each score.
            scores: [B].
            with_bare: whether the bare scores are read; otherwise they are 0.
        """
        facts = np.array(self._facts(keys) if with_bare else self._without_bare(keys), dtype=np.float64).reshape(-1, 2)
        tokens, bare = facts[:, 0].astype(np.int64), facts[:, 1]
        mean = scores.astype(np.float64)
        return mean if self.model.ranks_by_mean else mean / np.maximum(tokens, 1), tokens, bare

    def _facts(self, keys: Sequence[tuple[str, str | None]]) -> list[tuple[int, float]]:
        """Give the number of scored tokens and the bare score, a mean, of each query with its instruction."""
        known = self._bare_scores.of(self.model)
        found = {key: fact for key in keys if (fact := known.get(key)) is not None}
        if new := [key for key in dict.fromkeys(keys) if key not in found]:
            texts, instructions = [text for text, _ in new], [instruction for _, instruction in new]
            given = instructions if any(instructions) else None
            ranked = self._ranked(texts, [[""]] * len(texts), None, False, None, given)
            for key, (tokens, _), rows in zip(new, self._without_bare(new), ranked, strict=True):
                score = rows[0]["score"]
                found[key] = known[key] = tokens, score if self.model.ranks_by_mean else score / tokens
        for key in list(known)[: max(0, len(known) - _QUERIES_KEPT)]:
            known.pop(key, None)  # another thread may have taken it
        return [found[key] for key in keys]

    def _without_bare(self, keys: Sequence[tuple[str, str | None]]) -> list[tuple[int, float]]:
        """Give the number of scored tokens of each query, and 0."""
        texts = list(dict.fromkeys(text for text, _ in keys))
        counts = dict(zip(texts, map(self.model.scored_tokens, self.model.prompt.queries(texts, [])), strict=True))
        return [(counts[text], 0.0) for text, _ in keys]

    @cached_property
    def _bare_scores(self) -> BareScores:
        return BareScores()

    def _above(
        self,
        threshold: float | None,
        queries: list[str],
        ranked: list[list[dict[str, Any]]],
        instructions: Sequence[str | None] | None,
    ) -> list[list[dict[str, Any]]]:
        """Add "relevance" to the rows of rankings, and leave out those below a threshold; None changes nothing."""
        if threshold is None:
            return ranked
        given = instructions or [None] * len(queries)
        asked = [(query, words) for query, words, rows in zip(queries, given, ranked, strict=True) for _ in rows]
        scores = [row["score"] for rows in ranked for row in rows]
        found = iter(self.relevance([query for query, _ in asked], scores, [words for _, words in asked]).tolist())
        for rows in ranked:
            for row in rows:
                row["relevance"] = next(found)
        return [[row for row in rows if row["relevance"] >= threshold] for rows in ranked]
