"""The document-first engine: prefixes once per distinct document, suffixes per pair, the head on query tokens only.

The plain path (whole prompts, one row a pair, no cache) computes the same numbers; it serves models whose cache
cannot be shared, and is the oracle that the document-first path is tested against.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from .batch import Rows, pad
from .cache import DocumentCache
from .head import LikelihoodHead, log_likelihood_of_logits
from .prefix_cache import PrefixKV


class Engine:
    """Runs a frozen causal LM on prefixes and suffixes.

    Attributes:
        table: input embeddings [V, D].  scale: what the embedding module multiplies a row with.
        head: `LikelihoodHead`.
        why_plain: why prefixes cannot be shared ("" when they can).
    """

    def __init__(self, lm) -> None:
        if getattr(lm.config, "is_encoder_decoder", False):
            raise ValueError(f"{type(lm).__name__} is an encoder–decoder; a causal LM is expected")
        self.lm = lm
        self.decoder = lm.get_decoder()
        parameters = inspect.signature(self.decoder.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self.context = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
        with torch.no_grad():
            self.scale = self._embedding_scale()
            self.head = LikelihoodHead(lm, self.decoder)
            self.why_plain = self._why_plain()

    @property
    def table(self) -> Tensor:
        return self.lm.get_input_embeddings().weight

    @property
    def device(self) -> torch.device:
        return self.table.device

    @property
    def lm_is_trained(self) -> bool:
        return any(parameter.requires_grad for parameter in self.lm.parameters())

    def state(self) -> tuple:
        """Changes whenever a parameter of the LM is replaced or written to in place."""
        return tuple((p.data_ptr(), p._version, p.dtype) for p in self.lm.parameters())

    def _embedding_scale(self) -> float:
        module, table = self.lm.get_input_embeddings(), self.table
        if not table.is_floating_point() or table.dim() != 2:
            raise ValueError(
                f"the input embeddings must be a floating [V, D] table, got {table.dtype} {list(table.shape)}"
            )
        ids = torch.arange(min(64, table.shape[0]), device=table.device)
        rows, embedded = table[ids].float(), module(ids).float()
        if embedded.shape != rows.shape:
            raise ValueError(f"the input embeddings give width {embedded.shape[-1]}, their table has {rows.shape[-1]}")
        scale = float((rows * embedded).sum() / (rows * rows).sum().clamp_min(1e-30))
        scale = float(getattr(module, "scalar_embed_scale", scale))  # exact where the module states it (Gemma 3)
        if not torch.allclose(rows * scale, embedded, rtol=2e-2, atol=1e-6):
            raise ValueError("the input embeddings are not a scaled table (an adapter on them?); clues need the table")
        return 1.0 if abs(scale - 1) < 1e-6 else scale

    def _why_plain(self) -> str:
        try:
            ids = torch.zeros(1, 3, dtype=torch.long, device=self.device)
            PrefixKV.from_cache(self._run_prefix(ids, None, None), [3])
        except (TypeError, AttributeError, ValueError) as error:
            return f"its cache cannot be shared ({str(error).splitlines()[0]})"
        return ""

    def _run_prefix(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> DynamicCache:
        cache = DynamicCache(config=self.lm.config)
        extra = {"position_ids": positions} if self._takes_positions and positions is not None else {}
        self.decoder(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **extra)
        return cache

    def _expect_fits(self, tokens: int) -> None:
        if self.context and tokens > self.context:
            raise ValueError(
                f"a prompt of {tokens} tokens or more does not fit the LM's context of {self.context}; "
                "lower max_document_tokens or max_query_tokens"
            )

    def prefill(self, prefixes: Sequence[Sequence[int]]) -> PrefixKV:
        """One left-padded pass over document prefixes; with grad only where the LM itself is trained."""
        lengths = [len(ids) for ids in prefixes]
        width = max(lengths)
        self._expect_fits(width)
        ids, _ = pad([[0] * (width - len(row)) + list(row) for row in prefixes], self.device)
        starts = width - torch.tensor(lengths, device=self.device)
        slots = torch.arange(width, device=self.device)
        positions = (slots - starts[:, None]).clamp_min(0)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.lm_is_trained):
            return PrefixKV.from_cache(self._run_prefix(ids, (slots >= starts[:, None]).long(), positions), lengths)

    def cached_prefill(
        self, prefixes: Sequence[Sequence[int]], cache: DocumentCache | None, one_by_one: bool = False
    ) -> PrefixKV:
        """`prefill`, reading and filling the cache. ``one_by_one``: each prefix alone, unpadded."""
        with_grad = torch.is_grad_enabled() and self.lm_is_trained
        if with_grad and one_by_one:
            return PrefixKV.collate([self.prefill([prefix]) for prefix in prefixes])
        if with_grad or (cache is None and not one_by_one):
            return self.prefill(prefixes)
        state = self.state()
        keys = [DocumentCache.key(state, prefix) for prefix in prefixes]
        stored = [None if cache is None else cache.get(key) for key in keys]
        missing = [i for i, entry in enumerate(stored) if entry is None]
        groups = [[i] for i in missing] if one_by_one else [missing] if missing else []
        for group in groups:
            fresh = self.prefill([prefixes[i] for i in group])
            if cache is None and len(group) == len(prefixes):
                return fresh
            for i, entry in zip(group, fresh.split(), strict=True):
                stored[i] = entry
                if cache is not None:
                    cache.put(keys[i], entry)
            if cache is not None and len(group) == len(prefixes) and not one_by_one:
                return fresh  # a cold cache costs one copy, not two
        return PrefixKV.collate(stored)

    def log_likelihood(
        self, rows: Rows, clue_embeds: Tensor | None, prefix: PrefixKV | None = None, prefix_rows: Tensor | None = None
    ) -> Tensor:
        """log p of every query token of the rows.

        Args:
            rows: suffixes (with ``prefix``) or whole prompts (without).
            clue_embeds: the clue vectors of ``rows.clue_slots``, [number of clues, D], or None.
            prefix, prefix_rows: caches of the distinct documents and the one of each row, int64 [B].
        Returns: [N] float32, nats, in the order of ``rows.target_ids``.
        Raises: ValueError if a prompt is longer than the LM's context.
        """
        B, L = rows.ids.shape
        longest = L + (prefix.padded_length if prefix else 0)
        if self.context and longest > self.context:  # padding may lie outside, a token may not
            self._expect_fits(int((rows.positions * rows.mask).max()) + 1)
        embeds = self.lm.get_input_embeddings()(rows.ids)
        if clue_embeds is not None and len(clue_embeds):
            flat = embeds.reshape(B * L, -1).index_copy(0, rows.clue_slots, clue_embeds.to(embeds.dtype))
            embeds = flat.view_as(embeds)
        arguments = {"inputs_embeds": embeds, "attention_mask": rows.mask, "use_cache": False}
        # padding positions may lie past a learned position table
        positions = rows.positions if not self.context else rows.positions.clamp_max(self.context - 1)
        if prefix is not None:
            prefix_mask = prefix.mask(self.device)
            if prefix_rows is not None:
                prefix_mask = prefix_mask[prefix_rows]
            arguments |= {
                "attention_mask": torch.cat([prefix_mask, rows.mask], dim=1),
                "past_key_values": prefix.shared_by(prefix_rows),
                "use_cache": True,
            }
        if self._takes_positions:
            arguments["position_ids"] = positions
        if self.head.fused:
            hidden = self.decoder(**arguments).last_hidden_state
            return self.head(hidden.reshape(B * L, -1)[rows.before_query], rows.target_ids)
        keep = torch.zeros(B * L, dtype=torch.bool, device=embeds.device)
        keep[rows.before_query] = True
        logits = self.lm(**arguments, logits_to_keep=keep.view(B, L)).logits
        return log_likelihood_of_logits(logits.reshape(-1, logits.shape[-1]), rows.target_ids)
