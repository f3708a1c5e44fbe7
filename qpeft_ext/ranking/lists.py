"""Rankings of lists of candidates: blocks of queries whose pairs are scored together, and the order of each list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..engine.schedule import query_blocks
from ..prompts.prompt import Document
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
                scores[block] = self._score(pairs[block], bar, batch_size=batch_size, instructions=given)
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
                scores, start = self._score(pairs, bar, self._lists(block, candidates), batch_size, given), 0
                for i in block:
                    own = scores[start : start + len(candidates[i])]
                    start += len(own)
                    order = np.argsort(-own, kind="stable")[:top_k]
                    results.append([{"corpus_id": int(j), "score": float(own[j])} for j in order])
        return results

    def _lists(self, block: range, candidates: Sequence[Sequence]) -> list[int] | None:
        """The list of each pair of the block: with this source the same query in two lists has two lists of clues."""
        if self.model.qpeft_config.source != "candidates":
            return None
        return [i for i in block for _ in candidates[i]]


def blocks_of(candidates: Sequence[Sequence], max_pairs: int) -> list[range]:
    """Places of consecutive queries with about ``max_pairs`` pairs together."""
    return [range(len(candidates))[block] for block in query_blocks(list(map(len, candidates)), max_pairs)]
