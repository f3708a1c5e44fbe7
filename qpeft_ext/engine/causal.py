"""Causal LMs: the prefix pass, once for each distinct document, and the suffix pass, which reads its result."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..lm.faster import with_faster_attention, with_faster_layers, with_picked_rows
from ..lm.head import LikelihoodHead
from ..lm.passes import Hook
from ..lm.rope import find_rotary_tables
from ..ops.hardware import shape_step
from ..prefixes.cache import DocumentCache
from ..prefixes.keys import PrefixKey
from ..prefixes.kv import Packing, PrefixBatch, PrefixKV, SeparatePrefixes
from ..prompts.pairs import PairBatch, pad
from ..prompts.pieces import CluesFirstPieces, DocumentPrefix, SuffixPieces
from ..utils.memory import keep_freed_memory, return_freed_memory
from .base import BaseEngine
from .path_check import check_paths
from .rows import Rows, assemble_rows, with_clues
from .shared_cache import shared_cache


class _PrefixIsStored(Exception):
    pass


class _PrefixCache(DynamicCache):
    """Knows when the last layer has stored its keys and values, after which nothing of a prefix pass is needed.

    Args:
        last_layer: index of this layer; -1: never.
        ends: whether the pass is ended there, by a `_PrefixIsStored`.
    Attributes: complete: whether the last layer has stored its keys and values.
    """

    def __init__(self, last_layer: int, ends: bool = True, **kwargs) -> None:
        super().__init__(**kwargs)
        self.last_layer, self.ends, self.complete = last_layer, ends, False

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        result = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == self.last_layer:
            self.complete = True
            if self.ends:
                raise _PrefixIsStored
        return result


class CausalEngine(BaseEngine[Rows, PrefixBatch]):
    """Runs a frozen causal LM on prefixes and suffixes.

    Args:
        lm: the model.
        why_not_cached: a reason not to share prefixes that is known beforehand; "": try whether they can be shared.
    Attributes (and those of `BaseEngine`):
        packing: how keys and values of a prefix lie in memory; only where prefixes can be shared.
        last_layer: the last layer that stores keys and values; a prefix pass ends there (-1: it runs to its end).
        takes_positions: whether the decoder has ``position_ids`` (Bloom counts the mask instead).
        cache_argument: the name of the decoder's argument for the cache.
    """

    packing: Packing

    def __init__(self, lm: Any, why_not_cached: str = "") -> None:
        super().__init__(lm)
        if self.device.type == "cpu":
            keep_freed_memory()
        parameters = inspect.signature(self.decoder.forward).parameters
        self.takes_positions = "position_ids" in parameters
        self.cache_argument = "cache" if "cache" in parameters else "past_key_values"  # renamed in transformers 5.24
        self.last_layer = -1  # unknown
        with torch.no_grad():
            self.scale = self._embedding_scale()
            self.rotary = find_rotary_tables(self.decoder, self.context)
            self.head = LikelihoodHead(lm, self.own_forward)
            self.why_not_cached = why_not_cached or self._why_not_cached()
            self._find_faster_passes()
            found = check_paths(self, try_shared=not self.why_not_cached)
            self.why_not_cached, self.why_unpadded = self.why_not_cached or found.why_not_shared, found.why_unpadded

    def _why_not_cached(self) -> str:
        try:
            ids = torch.zeros(1, 3, dtype=torch.long, device=self.device)
            cache = self._run_prefix(self.embed(ids), None, None)
            prefix = PrefixKV.from_cache(cache, [3])
            self.packing = Packing.of(prefix)
            if not any(hasattr(module, "_hf_hook") for module in self.lm.modules()):  # a hook may count on the end
                self.last_layer = max(i for i, kv in enumerate(prefix.layers) if kv is not None)
        except (TypeError, AttributeError, ValueError) as error:
            return f"its cache cannot be shared ({str(error).splitlines()[0]})"
        return ""

    def _find_faster_passes(self) -> None:
        """Set ``lm_passes`` to the faster forms that agree with the LM's own, tried on three tokens."""
        ids = torch.arange(3, device=self.device)[None]
        if self.last_layer >= 0:
            cache = _PrefixCache(self.last_layer, ends=False, config=self.lm.config)
            given = {"input_ids": ids, "use_cache": True, self.cache_argument: cache}
            self.lm_passes = with_picked_rows(
                self.lm_passes, self.decoder, ids, lambda: self.decoder(**given), lambda: cache.complete
            )
        if not self.why_not_cached:
            self.lm_passes = with_faster_attention(with_faster_layers(self.lm_passes, self.decoder), self.decoder, ids)

    def _run_prefix(
        self, embeds: Tensor, mask: Tensor | None, positions: Tensor | None, leading: PrefixKV | None = None
    ) -> DynamicCache:
        cache = _PrefixCache(-1, config=self.lm.config)
        for layer, kv in enumerate(leading.layers if leading is not None else ()):
            if kv is not None:
                assert isinstance(kv.keys, Tensor) and isinstance(kv.values, Tensor), "a pass computed it"
                keys, values = (x.expand(len(embeds), -1, -1, -1) for x in (kv.keys, kv.values))
                cache.update(keys, values, layer)
        cache.last_layer = self.last_layer
        extra: dict[str, Any] = {self.cache_argument: cache}
        if self.takes_positions and positions is not None:
            extra["position_ids"] = positions
        with contextlib.suppress(_PrefixIsStored), self.lm_passes.prefix():
            self.decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=True, **extra)
        return cache

    def shares_prefixes(self, with_clues: bool) -> bool:
        return not self.why_not_cached

    @property
    def reads_in_place(self) -> bool:
        # on a GPU every copy is a launch, and a compiled pass would need a graph for every number of prefixes
        return self.device.type == "cpu" and not self.is_compiled

    def assemble(
        self, batch: PairBatch, pieces: SuffixPieces | CluesFirstPieces, clue_counts: Sequence[int], with_prefix: bool
    ) -> Rows:
        step = 1 if with_prefix else shape_step(self.device, self.table.dtype)
        # a prompt's last token counts in its length, also where it is only a target
        spare = int(with_prefix and self.rotary.limit is not None and pieces.asked is None)
        return assemble_rows(batch, pieces, clue_counts, self.device, with_prefix, step, spare)

    def outputs(
        self,
        rows: Rows,
        clue_embeds: Tensor | None,
        prefix: PrefixBatch | None = None,
        prefix_rows: Tensor | None = None,
        updates: Sequence[tuple[nn.Module, Hook]] = (),
    ) -> Tensor:
        B, L = rows.ids.shape
        self.expect_fits(rows.end)
        self.rotary.reset()
        embeds = self.embed(rows.ids, rows.ids.new_zeros(B) if prefix is None else None)
        embeds = with_clues(embeds, rows, clue_embeds)
        arguments: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": rows.mask, "use_cache": False}
        # padding must not reach beyond a learned position table, nor to where the rotary table changes
        positions = rows.positions.clamp_max(rows.end - 1)
        if prefix is not None:
            arguments |= {
                "attention_mask": torch.cat([prefix.mask(self.device, prefix_rows), rows.mask], dim=1),
                self.cache_argument: shared_cache(prefix, prefix_rows),
                "use_cache": True,
            }
        if self.takes_positions:
            arguments["position_ids"] = positions
        if prefix is None:
            with self.lm_passes.whole(updates):
                return self._read_rows(self.decoder, arguments, rows)
        with self.lm_passes.suffix(rows.read.slots, (B, L), updates):
            return self._read_rows(self.suffix_decoder, arguments, rows)

    def _read_rows(self, decoder: Callable[..., Any], arguments: dict[str, Any], rows: Rows) -> Tensor:
        """Run ``decoder``, or the LM where the head is left to it, and keep the outputs that are read."""
        if self.head.fused:
            return decoder(**arguments).last_hidden_state.flatten(0, 1)[rows.read.slots]
        keep = torch.zeros(rows.ids.numel(), dtype=torch.bool, device=rows.ids.device)
        keep[rows.read.slots] = True
        logits = self.lm(**arguments, logits_to_keep=keep.view_as(rows.ids)).logits
        logits = logits.reshape(-1, logits.shape[-1])
        # an LM that ignores ``logits_to_keep`` gives the logits of all rows
        return logits[rows.read.slots] if len(logits) == rows.ids.numel() else logits

    def token_bytes(self) -> tuple[int, float]:
        kept = 0 if self.why_not_cached else self.packing.nbytes(1)
        layers = max(1, getattr(self.lm.config.get_text_config(), "num_hidden_layers", 1))
        return kept, 2 * kept / layers  # gathered, and joined with the suffix's

    def prefix_bytes(self, prefixes: Sequence[DocumentPrefix], cache: DocumentCache) -> int:
        """Count the bytes of keys and values of prefixes, as a cache stores them."""
        packing = self.packing.stored_as(cache.kv_dtype)
        return sum(packing.nbytes(len(prefix.ids)) for prefix in prefixes)

    def prefill(self, prefixes: Sequence[Sequence[int]]) -> PrefixKV:
        """Read document prefixes in one pass, or one by one where they need different rotary tables."""
        lengths = [len(ids) for ids in prefixes]
        if len({self.rotary.of(length) for length in lengths}) > 1:
            return PrefixKV.collate([self.read_prefixes([prefix]) for prefix in prefixes])
        return self.read_prefixes(prefixes)

    def read_prefixes(self, prefixes: Sequence[Sequence[int]], leading: PrefixKV | None = None) -> PrefixKV:
        """Run one left-padded pass over document prefixes, which share a rotary table.

        Args:
            prefixes: token ids of each.
            leading: keys and values that each prefix begins with, of one row; the ids come after them.
        """
        P = 0 if leading is None else leading.padded_length
        lengths = [len(ids) for ids in prefixes]
        self.expect_fits(P + max(lengths))
        step = shape_step(self.device, self.table.dtype) if len(lengths) > 1 else 1
        width = -(-max(lengths) // step) * step
        if self.device.type == "cpu":
            return_freed_memory(least=512 << 20, share=0.02)
        ids, _ = pad([[0] * (width - len(row)) + list(row) for row in prefixes], self.device)
        starts = width - torch.tensor(lengths, device=self.device)
        slots = torch.arange(width, device=self.device)
        positions = P + (slots - starts[:, None]).clamp_min(0)
        mask = torch.cat([starts.new_ones(len(ids), P), (slots >= starts[:, None]).long()], dim=1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.prefix_is_trained):
            embeds = self.embed(ids, starts)
            cache = self._run_prefix(embeds, mask, positions, leading)
            return PrefixKV.from_cache(cache, [P + length for length in lengths], P)

    def cache_keys(
        self, prefixes: Sequence[Sequence[int]], cache: DocumentCache, deterministic: bool = False
    ) -> list[PrefixKey]:
        """Make the keys under which a cache stores prefixes of this LM."""
        version, kv_dtype = self.version(), self.packing.other_dtype(cache.kv_dtype)
        return [cache.key(version, prefix, deterministic, kv_dtype) for prefix in prefixes]

    def cached_prefill(
        self, prefixes: Sequence[Sequence[int]], cache: DocumentCache | None, deterministic: bool = False
    ) -> PrefixBatch:
        with_grad = torch.is_grad_enabled() and self.prefix_is_trained
        if with_grad and deterministic:
            return PrefixKV.collate([self.prefill([prefix]) for prefix in prefixes])
        if cache is not None and not with_grad:
            return self._through_cache(prefixes, cache, deterministic)
        if with_grad or not deterministic:
            return self.prefill(prefixes)
        return self._together([entry for prefix in prefixes for entry in self.prefill([prefix]).split()])

    def _through_cache(
        self, prefixes: Sequence[Sequence[int]], cache: DocumentCache, deterministic: bool
    ) -> PrefixBatch:
        """Read prefixes from a cache and put the others into it, all in the dtype of the cache."""
        keys = self.cache_keys(prefixes, cache, deterministic)
        packing = self.packing.stored_as(cache.kv_dtype)
        stored = cache.fetch(keys, packing, self.device)
        missing = [i for i, entry in enumerate(stored) if entry is None]
        groups = [[i] for i in missing] if deterministic else [missing] if missing else []
        for group in groups:
            fresh = self.prefill([prefixes[i] for i in group])
            as_computed = len(group) == len(prefixes) and packing == self.packing
            if as_computed and not cache.stores:
                return fresh
            # rounded before the first use too, so that a score does not depend on what was in the cache
            for i, entry in zip(group, fresh.split(packing.dtype), strict=True):
                stored[i] = entry
                cache.put(keys[i], entry)
            if as_computed and not deterministic:
                return fresh  # a cold cache costs one copy, not two
        return self._together([entry for entry in stored if entry is not None])  # all of them by now

    def _together(self, stored: list[PrefixKV]) -> PrefixBatch:
        """Put prefixes together for a suffix pass."""
        as_stored = len(stored) > 1 or Packing.of(stored[0]) != self.packing
        if as_stored and self.reads_in_place:
            return SeparatePrefixes(stored)
        return PrefixKV.collate(stored, self.packing.dtype)
