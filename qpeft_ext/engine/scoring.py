"""The passes that score pairs: what `QPeftModel` does with its LM, its prompt and its trained modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..adapters.attention_clues import AttentionClues
from ..adapters.generated_lora import GeneratedLora
from ..adapters.inputs import ClueInputs
from ..adapters.layers import Clues
from ..adapters.mixed_score import MixedScore
from ..adapters.projected_rows import ProjectedRows
from ..config import QPeftConfig
from ..lm.passes import Hook
from ..prefixes.cache import DocumentCache
from ..prefixes.kv import SeparatePrefixes
from ..prefixes.views import PrefixViews
from ..prompts.pairs import PairBatch, to_device
from ..prompts.prompt import Document, Prompt, as_pairs
from ..utils.inputs import true_or_false
from ..utils.torch_state import own_state
from .answers import Answer, Grades
from .causal import CausalEngine
from .schedule import Limits, default_tokens, schedule
from .scores import CountTokens, PassClues, Scores, counts_of, in_order
from .turns import TurnTaking, in_passes


def expect_path(path: object) -> None:
    """Check the name of a path of scoring.

    Raises: ValueError for another one.
    """
    if path not in ("document_first", "plain"):
        raise ValueError(f"path must be document_first or plain, got {path!r}")


class ScoringModel(TurnTaking):
    """A frozen LM, a prompt and trained modules, and the passes that score pairs with them.

    `QPeftModel`, the subclass that users make, builds the parts.

    Attributes:
        lm: the language model.
        engine: runs the LM on prefixes and suffixes.
        prompt: makes token ids of queries and documents.
        qpeft_config: every option.
        clues: the clue module; None for ``clues="none"``.
        generated_lora: the update of the LM that a query generates, or None.
        answer: the tokens behind the prompt whose logits are the score; None: the query's likelihood is.
        mixed_score: the weighted sum of both; None where the score is one of them.
        ranks_by_mean: whether documents are ranked by `Scores.compared`; otherwise by the sum of log-likelihoods.
    """

    prompt: Prompt
    qpeft_config: QPeftConfig
    clues: nn.Module | None
    generated_lora: GeneratedLora | None
    answer: Answer | Grades | None
    mixed_score: MixedScore | None
    ranks_by_mean: bool
    _count_tokens: CountTokens

    @property
    def why_no_index(self) -> str:
        """Say why there are no keys and values of documents to keep; "" where there are."""
        if self.prompt.query_first:
            return "its template has the query before the document, so that nothing of a document can be kept"
        return self.engine.why_not_cached

    def encode(
        self,
        pairs: Sequence[tuple[str, Document]],
        lists: Sequence[int] | None = None,
        truncate_queries: bool = False,
        instructions: Sequence[str | None] | None = None,
    ) -> PairBatch:
        """Tokenise pairs of a query and a document.

        Args:
            pairs: (query, document); a document is a string, or a dict with "text" and perhaps "title".
            lists: for each pair the list of candidates that it belongs to; None: all of a query's pairs are one list.
                It matters with ``source="candidates"`` only.
            truncate_queries: whether queries longer than ``max_query_tokens`` are cut at their end.
            instructions: for each pair an instruction that stands before its query and is not scored, or None.
        Returns: the batch for `forward`; each distinct text is in it once.
        Raises: TypeError or ValueError that names the pair and what is wrong with it.
        """
        checked = as_pairs(pairs, "encode")
        true_or_false(truncate_queries, "encode: truncate_queries")
        return PairBatch.from_text(self.prompt, checked, lists, truncate_queries, instructions)

    @in_passes
    def forward(
        self,
        batch: PairBatch,
        path: str = "document_first",
        cache: DocumentCache | None = None,
        max_tokens_per_batch: int | None = None,
        deterministic: bool = False,
        prefilled: bool = False,
        max_pairs_per_batch: int | None = None,
        projected: ProjectedRows | None = None,
    ) -> Scores:
        """Score B pairs, with gradient unless it is disabled.

        Args:
            batch: from `encode`.
            path: "document_first" reads each distinct document once and then the suffixes of its pairs; "plain" reads
                whole prompts. LMs whose cache cannot be shared take the plain path either way, and so does
                ``layout="clues_first"``.
            cache: prefixes are read from it and put into it, unless they need a gradient (a soft prompt or the LM
                is trained); None: they are kept for this call only.
            max_tokens_per_batch: token budget of a pass; None: what suits the device (`schedule.default_tokens`).
            deterministic: whether every prefix, clue and suffix is computed unpadded, one per pass, so that a score is
                bit-equal whatever else is in the batch or in the cache (same machine and number of threads). Slower.
            prefilled: whether the prefixes of all documents are in the cache already (`CacheFilling`): documents of
                different lengths may share a pass.
            max_pairs_per_batch: pairs in a suffix pass at most; None: as many as the token budget allows. With a
                gradient the passes are then computed again in the backward pass, as with ``suffix_micro_batch``.
            projected: rows of the embedding table that Q-PEFT-A reuses between calls with it, without gradient. Not
                used with ``deterministic``.
        Returns: the scores, in the order of ``batch.pairs``.
        Raises: ValueError for another path, or a prompt that is longer than the LM's context.
        """
        expect_path(path)
        true_or_false(deterministic, "deterministic")
        if not len(batch):
            empty = torch.zeros(0, dtype=torch.float32, device=self.device)
            return Scores(empty, empty.long(), *([empty] if self.answer else []))
        batch = batch.in_reading_order()
        limits = self._limits(path, max_tokens_per_batch, max_pairs_per_batch, deterministic, prefilled)
        projected = None if deterministic else projected
        clues, rows, parts = PassClues(partial(self.compute_clues, projected=projected), batch), [], []
        for read in schedule(batch, limits, self._rotary_tables(batch, projected)):
            prefix = None  # the one before is not needed any more
            if read.shared:
                ids = [batch.documents[d].ids for d in read.documents]
                prefix = self.engine.cached_prefill(ids, cache, deterministic=deterministic)
            for pairs in read.suffixes:
                own = clues.of(pairs, read.clues_of)
                rows.append(pairs)
                parts.append(self._score_group(batch.select(pairs), *own, read.documents, prefix, limits.recompute))
        return in_order(rows, parts)

    def _limits(
        self, path: str, max_tokens: int | None, max_pairs: int | None, deterministic: bool, prefilled: bool
    ) -> Limits:
        """Gather what decides the passes of a call of `forward`, whose arguments these are."""
        config, engine = self.qpeft_config, self.engine
        return Limits(
            device=self.device,
            dtype=engine.table.dtype,
            max_tokens=max_tokens or default_tokens(self.device),
            max_pairs=max_pairs,
            micro_batch=config.suffix_micro_batch,
            with_grad=torch.is_grad_enabled(),
            deterministic=deterministic,
            unpadded=bool(engine.why_unpadded),
            shared=path == "document_first" and engine.shares_prefixes(self.clues is not None),
            prefilled=prefilled,
            in_place=engine.reads_in_place,
            clue_per_token=config.clues == "attention",
            clues_per_pair=(config.k or 0) if config.clues == "top_k" else 0,
            clue_bytes=4 * engine.table.shape[1],
            clues_of_lists=config.source != "document",
        )

    def _rotary_tables(self, batch: PairBatch, projected: ProjectedRows | None) -> list[int]:
        """Give the rotary table that each pair is read with; 0 is the table that prefixes are cached with."""

        @torch.no_grad()
        def clue_counts() -> list[int]:
            return counts_of(self.compute_clues(batch, projected=projected), len(batch))

        most = 0 if self.clues is None else 2 * (self.qpeft_config.k or 1) * max(map(len, batch.queries))
        return self.engine.table_of_each(batch, self.prompt.suffix, clue_counts, most)

    @torch.no_grad()
    @in_passes
    def score_views(
        self,
        batch: PairBatch,
        visible: Tensor,
        cache: DocumentCache | None = None,
        max_tokens_per_batch: int | None = None,
        deterministic: bool = False,
    ) -> Tensor:
        """Score one pair several times, each time with some tokens of its document hidden; without clues.

        The document is read once, or taken from the cache. A hidden token is not attended to, but what later tokens
        have learned from it stays in their keys and values.

        Args:
            batch: one pair, from `encode`.
            visible: which tokens of the document's prefix are seen each time, bool [N, P].
            cache, max_tokens_per_batch, deterministic: as in `forward`.
        Returns: the score of each time, float32 [N].
        Raises: ValueError for an LM that cannot share prefixes (`BaseEngine.why_not_cached`).
        """
        if self.engine.why_not_cached:
            raise ValueError(f"score_views: the tokens of a prefix cannot be hidden: {self.engine.why_not_cached}")
        assert isinstance(self.engine, CausalEngine), "only its prefixes can be shared"
        ((query, document),) = batch.pairs
        prefix = self.engine.cached_prefill([batch.documents[document].ids], cache, deterministic=deterministic)
        of_a_view = batch.instruction_length(query) + len(batch.queries[query]) + visible.shape[1]
        views = 1 if deterministic else max(1, (max_tokens_per_batch or default_tokens(self.device)) // of_a_view)
        parts = []
        for part in visible.split(views):
            N, seen = len(part), PrefixViews.of(prefix, part, self.engine.packing.dtype)
            copies = replace(batch, pairs=batch.pairs * N)
            parts.append(self.ranked_by(self._score_group(copies, None, [0] * N, [document], seen, False)))
        return torch.cat(parts)

    @in_passes
    def compute_clues(
        self, batch: PairBatch, explain: bool = False, projected: ProjectedRows | None = None
    ) -> Clues | None:
        """Compute the clues of every pair of a batch; None for ``clues="none"``.

        Args:
            batch: from `encode`.
            explain: whether the result has an explanation.
            projected: for `AttentionClues`, table rows to reuse between calls.
        """
        if self.clues is None:
            return None
        inputs = ClueInputs.from_batch(batch, self.device, self.qpeft_config.source)
        reused = {"projected": projected} if isinstance(self.clues, AttentionClues) else {}
        return self.clues(inputs, self.engine.table, self.engine.scale, explain, **reused)

    def _score_group(
        self,
        batch: PairBatch,
        clues: Clues | None,
        counts: Sequence[int],
        documents: list[int],
        prefix: Any,
        recompute: bool,
    ) -> Scores:
        """Score the pairs of one suffix pass.

        Args:
            batch: these pairs only.
            clues, counts: the clues of the pairs, and how many each has.
            documents, prefix: the documents that were read before, and the result; None: read whole prompts.
            recompute: whether activations are computed again in the backward pass instead of being kept for it.
        """
        vectors = None if clues is None else clues.embeds[clues.mask]
        rows = self._rows(batch, counts, with_prefix=prefix is None)
        prefix_rows = None
        if prefix is not None:
            place = {d: i for i, d in enumerate(documents)}
            order = [place[d] for _, d in batch.pairs]
            if isinstance(prefix, SeparatePrefixes):
                prefix, order = prefix.of_pairs(order)
            if order != list(range(len(prefix.lengths))):
                prefix_rows = to_device(np.array(order), self.device)
        arguments = (batch, rows, vectors, prefix, prefix_rows)
        if recompute:  # own_state, because the backward pass runs outside of this method's state of torch
            log_p, answer = checkpoint(own_state()(self._read), *arguments, use_reentrant=False)
        else:
            log_p, answer = self._read(*arguments)
        if log_p is None:
            return Scores(answer=answer)
        likelihood = rows.sum_of_each_pair(log_p)
        tokens = self._count_tokens(log_p, rows.sum_of_each_pair, batch)
        mixed = None if self.mixed_score is None else self.mixed_score(likelihood / tokens, answer)
        return Scores(likelihood, tokens, answer, mixed)

    def _rows(self, batch: PairBatch, counts: Sequence[int], with_prefix: bool) -> Any:
        """Lay out what the LM reads of each pair, and the tokens that are scored."""
        return self.engine.assemble(batch, self.prompt.suffix, counts, with_prefix)

    def _read(
        self, batch: PairBatch, rows: Any, vectors: Tensor | None, prefix: Any, prefix_rows: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Compute log p of the scored tokens of the rows, [N], and the answers, [B]; None for what is not read.

        Each query updates the LM for its own suffixes.
        """
        updates: Sequence[tuple[nn.Module, Hook]] = ()
        if self.generated_lora is not None:
            gates = self.generated_lora.gates_of_pairs(batch, self.engine.table)
            updates = self.generated_lora.updates(gates, rows.suffix)
        outputs, head = self.engine.outputs(rows, vectors, prefix, prefix_rows, updates), self.engine.head
        before_scored, before_answer = rows.read.split(outputs)
        log_p = answer = None
        if before_scored is not None:
            log_p = head.log_likelihood(before_scored, rows.target_ids)
        if before_answer is not None and self.answer is not None:
            answer = self.answer.score(head.token_logits(before_answer, self.answer.token_ids(self.device)))
        return log_p, answer

    def ranked_by(self, scores: Scores) -> Tensor:
        """Return what documents are ranked by, float32 [B].

        Args:
            scores: of this model.
        """
        return scores.compared if self.ranks_by_mean else scores.query_log_likelihood

    def scored_tokens(self, query: tuple[int, ...]) -> int:
        """Count the tokens of a query that `Scores.compared` divides a sum by; 1 where it is no mean.

        Args:
            query: token ids.
        """
        return max(1, len(self.prompt.suffix.scored(query)))

    def head_rows(self, query: str) -> float:
        """Count the rows that the LM head runs on for a pair; the logits of K answers are K/V of a row.

        Args:
            query: its text.
        """
        of_answers = 0 if self.answer is None else len(self.answer.token_ids(self.device)) / len(self.engine.table)
        reads_query = self.answer is None or self.mixed_score is not None
        return of_answers + (len(self.prompt.queries([query])[0]) if reads_query else 0)

    @torch.no_grad()
    def score(self, pairs: Sequence[tuple[str, Document]], **options: Any) -> Scores:
        """Score pairs of a query and a document, without gradient.

        Args:
            pairs: as in `encode`.
            options: of `forward`: ``path``, ``cache``, ``deterministic``, ….
        Returns: the scores, in the order of the pairs.
        Raises: as `encode` and `forward`.
        """
        return self(self.encode(pairs), **options)
