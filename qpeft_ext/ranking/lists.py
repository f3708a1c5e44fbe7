"""Rankings of lists of candidates: blocks of queries whose pairs are scored together, and the order of each list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from ..engine.schedule import query_blocks
from ..prompts.prompt import Document
from ..prompts.sentences import Span
from ..utils.inputs import whole_number
from ..utils.progress import progress_bar
from .scoring import PairScorer

_PAIRS_PER_BLOCK = 8192  # tokenised together and sorted together: about 60 MB of ids when no document is shared
PAIRS_PER_LIST_BLOCK = 1024  # with source="candidates", and for `similarity`, which keep all of a block in memory


class ListRanker(PairScorer):
    """Ranks lists of candidates block by block; a base of `Reranker`, whose options it has."""

    def _predicted(
        self,
        pairs: Sequence[tuple[str, Document]],
        show_progress_bar: bool | None,
        batch_size: int | None,
        instructions: Sequence[str | None] | None = None,
    ) -> np.ndarray:
        """Score pairs that are checked, in the order given: float32 [B], nats."""
        scores = np.empty(len(pairs), dtype=np.float32)
        with progress_bar(total=len(pairs), unit="pair", desc="rerank", show=show_progress_bar) as bar:
            for start in range(0, len(pairs), _PAIRS_PER_BLOCK):
                block = slice(start, start + _PAIRS_PER_BLOCK)
                given = None if instructions is None else instructions[block]
                scores[block], _ = self._score_documents(pairs[block], bar, batch_size=batch_size, instructions=given)
        return scores

    def _ranked(
        self,
        queries: list[str],
        candidates: list[list[Document]],
        top_k: int | None,
        show_progress_bar: bool | None,
        batch_size: int | None,
        instructions: Sequence[str | None] | None = None,
    ) -> list[list[dict[str, Any]]]:
        """Do what `rank_many` does, with lists that are checked."""
        top_k, batch_size = whole_number(top_k, "top_k"), whole_number(batch_size, "batch_size")
        size = PAIRS_PER_LIST_BLOCK if self.model.qpeft_config.source == "candidates" else _PAIRS_PER_BLOCK
        results = []
        with progress_bar(total=sum(map(len, candidates)), unit="pair", desc="rerank", show=show_progress_bar) as bar:
            for block in blocks_of(candidates, size):
                pairs = [(queries[i], document) for i in block for document in candidates[i]]
                given = instructions and [instructions[i] for i in block for _ in candidates[i]]
                scores, spans = self._score_documents(pairs, bar, self._lists(block, candidates), batch_size, given)
                start = 0
                for i in block:
                    own = scores[start : start + len(candidates[i])]
                    order = np.argsort(-own, kind="stable")[:top_k].tolist()
                    rows: list[dict[str, Any]] = [{"corpus_id": j, "score": float(own[j])} for j in order]
                    for row in rows if spans else ():
                        row["passage"] = spans[start + row["corpus_id"]]
                    results.append(rows)
                    start += len(own)
        return results

    def _score_documents(
        self,
        pairs: Sequence[tuple[str, Document]],
        bar: tqdm,
        lists: list[int] | None = None,
        batch_size: int | None = None,
        instructions: Sequence[str | None] | None = None,
    ) -> tuple[np.ndarray, list[Span]]:
        """Score the pairs of a block, with ``passages`` by the passages of their documents; arguments as for `_score`.

        Returns: float32 [B]; with ``passages`` (start, end) of each document's best one, otherwise none.
        """
        if self.passages is None or not pairs:
            return self._score(pairs, bar, lists, batch_size, instructions), []
        before = self.passages.cut_titles
        split = self.passages.split([document for _, document in pairs])
        self.truncated += self.passages.cut_titles - before
        counts = list(map(len, split))
        bar.total = (bar.total or 0) + sum(counts) - len(pairs)
        parts = []
        # passages of one list give clues to each other, so they stay together
        for block in [range(len(pairs))] if lists else blocks_of(split, _PAIRS_PER_BLOCK):
            expanded = [(pairs[i][0], passage.document) for i in block for passage in split[i]]
            own = lists and [lists[i] for i in block for _ in split[i]]
            given = instructions and [instructions[i] for i in block for _ in split[i]]
            parts.append(self._score(expanded, bar, own, batch_size, given))
        scores, best = self.passages.combined(np.concatenate(parts), counts)
        winners = (passages[place] for passages, place in zip(split, best, strict=True))
        return scores, [(winner.start, winner.end) for winner in winners]

    def _lists(self, block: range, candidates: Sequence[Sequence]) -> list[int] | None:
        """The list of each pair of the block: with this source the same query in two lists has two lists of clues."""
        if self.model.qpeft_config.source != "candidates":
            return None
        return [i for i in block for _ in candidates[i]]


def blocks_of(candidates: Sequence[Sequence], max_pairs: int) -> list[range]:
    """Places of consecutive queries with about ``max_pairs`` pairs together."""
    return [range(len(candidates))[block] for block in query_blocks(list(map(len, candidates)), max_pairs)]
