"""What is known of a frozen LM of any kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from typing import Self

import torch
from torch import Tensor, nn

from ..adapters.soft_prompt import SoftPrompt
from ..lm.decoder import find_decoder
from ..lm.head import LikelihoodHead, log_likelihood_of_logits
from ..lm.passes import Hook, LMPasses, hooked
from ..lm.rope import RotaryTables
from ..lm.state import LMState, LMVersion
from ..prompts.pairs import PairBatch
from ..prompts.prompt import SuffixPieces


class BaseEngine(ABC):
    """What is known of a frozen LM of any kind; see `causal.CausalEngine` and `encoder_decoder.EncoderDecoderEngine`.

    Attributes:
        table: input embeddings [V, D].  scale: what the embedding module multiplies a row with.
        head: `LikelihoodHead`.
        soft_prompt: trained virtual tokens in every prefix (`SoftPrompt`), or None.
        why_plain: why keys and values of prefixes cannot be shared ("" when they can).
        why_unpadded: why each pair has a pass of its own ("" where several share one).
        context: the longest prompt, in tokens (None: unlimited).
        rotary: which prompts are read with the same rotary tables.
        suffix_decoder: what suffix passes run: the decoder, compiled or not.
        lm_passes: what the passes change in the LM for their time.
    """

    is_encoder_decoder = False
    head: LikelihoodHead

    def __init__(self, lm) -> None:
        self.lm = lm
        self.decoder = self.suffix_decoder = find_decoder(lm, lambda: self._own_logits((0, 1, 2), (1,)))
        self.why_unpadded = ""
        self.soft_prompt: SoftPrompt | None = None
        self.lm_passes = LMPasses(lm)
        self.context, self._context_is = _context(lm.config.get_text_config())
        self.rotary = RotaryTables()

    def with_soft_prompt(self, soft_prompt: SoftPrompt | None) -> Self:
        """The same engine with trained virtual tokens in every prefix."""
        engine = copy(self)
        engine.soft_prompt = soft_prompt
        return engine

    def log_likelihood(
        self,
        rows,
        clue_embeds: Tensor | None,
        prefix=None,
        prefix_rows: Tensor | None = None,
        updates: Sequence[tuple[nn.Module, Hook]] = (),
    ) -> Tensor:
        """log p of every scored token of the rows, [N] float32, nats, in the order of ``rows.target_ids``.

        Args and Raises: those of `outputs`.
        """
        read = self.outputs(rows, clue_embeds, prefix, prefix_rows, updates)
        return (self.head if self.head.fused else log_likelihood_of_logits)(read, rows.target_ids)

    @abstractmethod
    def outputs(
        self,
        rows,
        clue_embeds: Tensor | None,
        prefix=None,
        prefix_rows: Tensor | None = None,
        updates: Sequence[tuple[nn.Module, Hook]] = (),
    ) -> Tensor:
        """What the head reads for each scored token, [N, D]; where it is left to the LM, its logits [N, V]."""

    def compile(self, backend: str = "inductor") -> None:
        """`torch.compile` the decoder for suffix passes, with dynamic shapes; prefix passes stay as they are."""
        if not self.is_compiled:
            self.suffix_decoder = torch.compile(self.decoder, dynamic=True, backend=backend)
            self.lm_passes = self.lm_passes.compiled()

    def own_forward(self, before: Sequence[int], query: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What the LM itself makes of one prompt, from ids: logits [L, V] and its decoder's hidden states [L, D].

        query: what is given of it.  L: of the whole prompt, or of what the decoder of an encoder–decoder LM reads.
        """
        hidden: list[Tensor] = []
        with hooked(after=[(self.decoder, lambda *call: hidden.append(call[-1].last_hidden_state))]):
            logits = self._own_logits(before, query)
        return logits[0], hidden[-1][0]

    def _own_logits(self, before: Sequence[int], query: Sequence[int]) -> Tensor:
        ids = torch.tensor([[*before, *query]], device=self.device)
        return self.lm(input_ids=ids, use_cache=False).logits

    @property
    def is_compiled(self) -> bool:
        return self.suffix_decoder is not self.decoder

    @property
    def embeddings(self):
        """The module that embeds document and clue tokens."""
        return self.lm.get_input_embeddings()

    @property
    def table(self) -> Tensor:
        return self.embeddings.weight

    @property
    def device(self) -> torch.device:
        return self.table.device

    @property
    def prefix_is_trained(self) -> bool:
        """Whether prefixes get gradients: of an adapter in the LM, or of a soft prompt."""
        modules = (module for module in (self.soft_prompt, self.lm) if module is not None)
        return any(parameter.requires_grad for module in modules for parameter in module.parameters())

    def version(self) -> LMVersion:
        """What prefixes are computed with: the LM and the soft prompt, as they are now."""
        return LMState.of(self.lm, self.soft_prompt).version()

    def embed(self, ids: Tensor, prefix_starts: Tensor | None = None) -> Tensor:
        """``inputs_embeds`` of ids [B, L]; with the soft prompt if rows hold prefixes, that of row i from slot
        ``prefix_starts[i]`` on.
        """
        embeds = self._embed_tokens(ids)
        if prefix_starts is None or self.soft_prompt is None:
            return embeds
        return self.soft_prompt.put_into(embeds, prefix_starts)

    def _embed_tokens(self, ids: Tensor) -> Tensor:
        return self.embeddings(ids)

    def _embedding_scale(self) -> float:
        module, table = self.embeddings, self.table
        if not table.is_floating_point() or table.dim() != 2:
            raise ValueError(
                f"the input embeddings must be a floating [V, D] table, got {table.dtype} {list(table.shape)}"
            )
        wrapped = hasattr(module, "base_layer")  # an adapter may have changed a few rows anywhere
        ids = torch.arange(len(table) if wrapped else min(64, len(table)), device=table.device)
        rows, embedded = table[ids].float(), module(ids).float()
        if embedded.shape != rows.shape:
            raise ValueError(f"the input embeddings give width {embedded.shape[-1]}, their table has {rows.shape[-1]}")
        scale = float((rows * embedded).sum() / (rows * rows).sum().clamp_min(1e-30))
        scale = float(getattr(module, "scalar_embed_scale", scale))  # exact where the module states it (Gemma 3)
        if not torch.allclose(rows * scale, embedded, rtol=2e-2, atol=1e-6):
            raise ValueError(
                "the input embeddings are not a scaled table; clues need the table (merge an adapter on "
                "them: merge_and_unload)"
            )
        return 1.0 if abs(scale - 1) < 1e-6 else scale

    def table_of_each(
        self, batch: PairBatch, pieces: SuffixPieces, clue_counts: Callable[[], Sequence[int]], most_clues: int
    ) -> list[int]:
        """Which rotary table each pair's prompt is read with (`RotaryTables.of`).

        clue_counts: gives the clues of each pair; only asked if ``most_clues``, the most that one may have, matter.
        """

        def tables(counts: Sequence[int]) -> list[int]:
            return [self.rotary.of(len(pieces.lay_out(batch.documents[d].ids, count)[0])
                                   + len(pieces.scored(batch.queries[q])))
                    for (q, d), count in zip(batch.pairs, counts, strict=True)]  # fmt: skip

        if self.rotary.limit is None or not any(tables([most_clues] * len(batch))):
            return [0] * len(batch)
        return tables(clue_counts())

    def expect_fits(self, tokens: int) -> None:
        if self.context and tokens > self.context:
            raise ValueError(
                f"a prompt of {tokens} tokens or more does not fit the LM's {self._context_is} of {self.context}; "
                f"lower max_document_tokens{'' if self.soft_prompt is None else ', num_virtual_tokens'} or "
                "max_query_tokens"
            )


def _context(config) -> tuple[int | None, str]:
    """The longest prompt, and what it is.

    Sparse attention chooses some keys for each query where there are more (Doge, DeepSeek-V3.2). Ties are broken in a
    way that depends on all that is read, so that an LM's own scores of a longer prompt depend on what shares its pass.
    """
    limits = {"max_position_embeddings": "context", "keep_window_size": "full attention (keep_window_size)",
              "index_topk": "full attention (index_topk)"}  # fmt: skip
    found = [(value, words) for name, words in limits.items() if isinstance(value := getattr(config, name, None), int)]
    return min(found, default=(None, "context"), key=lambda limit: limit[0])
