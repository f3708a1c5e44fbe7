"""Scores of many pairs: jobs of a size that suits the progress bar, prefixes from a cache, and what fits in memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import zip_longest
from typing import TypeVar

import numpy as np
import torch
from tqdm import tqdm

from ..adapters.projected_rows import ProjectedRows
from ..engine.filling import CacheFilling
from ..engine.schedule import document_jobs, suffix_jobs
from ..engine.scores import Scores
from ..model import QPeftModel
from ..prefixes.cache import DocumentCache
from ..prompts.pairs import PairBatch
from ..prompts.prompt import Document
from ..utils.inputs import short
from ..utils.memory import retry_with_less
from ..utils.progress import progress_bar
from .passages import PassageScoring

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_PAIRS_PER_READ = 64  # whose prefixes are read from files while as many are scored
_PAIRS_PER_JOB = 256  # of a block, between two steps of the progress bar; scored again after an out-of-memory error


class PairScorer:
    """Scores the pairs of one block at a time; the options are those of `Reranker`, which it is the base of.

    Args:
        model, max_tokens_per_batch, cache, deterministic, path, truncate_queries: as for `Reranker`.
        projected: the table rows that Q-PEFT-A reuses between calls.
        passages: how documents are scored by their passages; None: as a whole.
    """

    def __init__(
        self,
        model: QPeftModel,
        max_tokens_per_batch: int,
        cache: DocumentCache | None,
        deterministic: bool,
        path: str,
        truncate_queries: bool,
        projected: ProjectedRows,
        passages: PassageScoring | None,
    ) -> None:
        self.model = model.eval()
        self.max_tokens_per_batch = max_tokens_per_batch
        self.cache = cache
        self.deterministic = deterministic
        self.path = path
        self.truncate_queries = truncate_queries
        self.projected = projected
        self.passages = passages
        self.truncated = self.truncated_queries = 0

    def exclusive(self) -> AbstractContextManager[None]:
        """Keep other threads from scoring with this LM while this is entered: see `QPeftModel.exclusive`."""
        return self.model.exclusive()

    def expect_index(self) -> None:
        """Check that the index in the cache, if there is one, has prefixes of this prompt and of these passages.

        Another one would be of no use and no harm, so that nobody would notice.

        Raises: ValueError that says what differs.
        """
        if self.cache is not None and self.cache.index is not None:
            passages = None if self.passages is None else self.passages.splitter.settings
            self.cache.index.expect_prompt(self.model.prompt, passages)

    def score(
        self,
        pairs: Sequence[tuple[str, Document]],
        lists: list[int] | None = None,
        instructions: Sequence[str | None] | None = None,
    ) -> np.ndarray:
        """Score pairs that are checked already, each document as a whole also with ``passages``.

        Args:
            pairs: (query, document).
            lists: the list of candidates that each pair belongs to, where clues depend on it.
            instructions: the instruction of each pair, or None.
        Returns: float32 [B], nats.
        Raises: ValueError for a score that is not finite.
        """
        with progress_bar(total=len(pairs), show=False) as bar:
            return self._score(pairs, bar, lists, None, instructions)

    def _score(
        self,
        pairs: Sequence[tuple[str, Document]],
        bar: tqdm,
        lists: list[int] | None = None,
        batch_size: int | None = None,
        instructions: Sequence[str | None] | None = None,
    ) -> np.ndarray:
        """Score the pairs of a block, which the progress bar counts.

        Args:
            lists: the list of candidates that each pair belongs to, where clues depend on it.
            batch_size: pairs in a suffix pass at most.
            instructions: the instruction of each pair, or None.
        Returns: float32 [B].
        Raises: ValueError for a score that is not finite.
        """
        if not pairs:
            return np.zeros(0, dtype=np.float32)
        with self.model.passes(evaluating=True):
            scores = self._score_in_turn(pairs, bar, lists, batch_size, instructions)
        if not np.isfinite(scores).all():
            query, _ = pairs[int(np.flatnonzero(~np.isfinite(scores))[0])]
            raise ValueError(
                f"the score of query {short(query)} is not finite; the LM or the adapter has broken weights, "
                "or its dtype overflows (try bfloat16 or float32)"
            )
        return scores

    def _score_in_turn(
        self,
        pairs: Sequence[tuple[str, Document]],
        bar: tqdm,
        lists: list[int] | None,
        batch_size: int | None,
        instructions: Sequence[str | None] | None,
    ) -> np.ndarray:
        """Do what `_score` does, while no other thread uses the LM."""
        self.expect_index()
        batch = self.model.encode(pairs, lists, self.truncate_queries, instructions)
        self.truncated += sum(document.cut > 0 for document in batch.documents)
        self.truncated_queries += batch.cut_queries
        batch = batch.in_reading_order()
        jobs, prefilled = self._jobs(batch)
        rows: list[int] = []
        parts: list[torch.Tensor] = []
        for job in jobs:
            scores = self._score_job(batch.select(job), prefilled, batch_size)
            parts.append(self.model.ranked_by(scores))
            rows += job
            bar.update(len(job))
        in_order = np.empty(len(pairs), dtype=np.float32)
        in_order[rows] = torch.cat(parts).float().cpu().numpy()
        return in_order

    def _score_job(self, batch: PairBatch, prefilled: bool, batch_size: int | None) -> Scores:
        return self._within_memory(
            lambda tokens: self.model(
                batch,
                path=self.path,
                cache=self.cache,
                deterministic=self.deterministic,
                max_tokens_per_batch=tokens,
                prefilled=prefilled,
                max_pairs_per_batch=batch_size,
                projected=self.projected,
            )
        )

    def _jobs(self, batch: PairBatch) -> tuple[Iterator[list[int]], bool]:
        """Lists of pairs to score one after the other, and whether all prefixes are in the cache's memory by then."""
        size = _PAIRS_PER_JOB if self.model.qpeft_config.source == "document" else len(batch)
        if self.path != "document_first" or self.cache is None:
            return document_jobs(batch, size), False
        jobs = list(document_jobs(batch, min(size, _PAIRS_PER_READ)))
        filling = CacheFilling(self.model.engine, self.cache, self.deterministic)
        at_once = self.model.device.type == "cpu" and filling.has_room(batch)
        in_files = filling.announce(batch if at_once else batch.select(jobs[0]))
        if in_files and not at_once:  # copies to a GPU and its passes go on side by side
            return _read_ahead(filling, batch, jobs), False
        filled = self._within_memory(lambda tokens: filling.fill(batch, tokens))
        return (suffix_jobs if filled else document_jobs)(batch, size), filled

    @torch.no_grad()
    def _within_memory(self, work: Callable[[int], Result]) -> Result:
        """Return ``work(max_tokens_per_batch)``; when the device runs out of memory the budget is halved for good."""
        return retry_with_less(lambda: work(self.max_tokens_per_batch), self._halve_budget)

    def _halve_budget(self) -> bool:
        if self.max_tokens_per_batch == 1:  # every pass is one document or one pair already
            return False
        self.max_tokens_per_batch //= 2
        logger.warning("out of memory: retrying with max_tokens_per_batch=%d", self.max_tokens_per_batch)
        return True


def _read_ahead(filling: CacheFilling, batch: PairBatch, jobs: list[list[int]]) -> Iterator[list[int]]:
    """Yield the jobs; while one is scored, the system reads the files of the next one."""
    for job, following in zip_longest(jobs, jobs[1:]):
        filling.announce(batch.select(following or []))
        yield job
