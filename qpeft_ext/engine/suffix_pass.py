"""The suffix pass: the pairs' suffixes after the caches of their documents, the head on query tokens only.

The plain path (whole prompts, one row a pair, no cache) computes the same numbers; it serves models whose cache
cannot be shared, and is the oracle that the document-first path is tested against.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from ..lm.head import log_likelihood_of_logits
from ..prefixes.kv import LayerKV, PrefixKV, left_pad
from ..prompts.pairs import Rows

if TYPE_CHECKING:
    from .causal import Engine


def log_likelihood(
    engine: Engine,
    rows: Rows,
    clue_embeds: Tensor | None,
    prefix: PrefixKV | None = None,
    prefix_rows: Tensor | None = None,
) -> Tensor:
    """log p of every query token of the rows, [N] float32, nats, in the order of ``rows.target_ids``.

    Args and Raises: those of `outputs`.
    """
    found = outputs(engine, rows, clue_embeds, prefix, prefix_rows)
    return (engine.head if engine.head.fused else log_likelihood_of_logits)(found, rows.target_ids)


def outputs(
    engine: Engine,
    rows: Rows,
    clue_embeds: Tensor | None,
    prefix: PrefixKV | None = None,
    prefix_rows: Tensor | None = None,
) -> Tensor:
    """What the head reads for each query token of the rows, [N, D]; where it is left to the LM, its logits [N, V].

    Args:
        rows: suffixes (with ``prefix``) or whole prompts (without).
        clue_embeds: the clue vectors of ``rows.clue_slots``, [number of clues, D], or None.
        prefix, prefix_rows: caches of the distinct documents and the one of each row, int64 [B].
    Raises: ValueError if a prompt is longer than the LM's context.
    """
    B, L = rows.ids.shape
    engine.expect_fits(rows.end)
    engine.rotary.reset()
    embeds = engine.embed(rows.ids, rows.ids.new_zeros(B) if prefix is None else None)
    embeds = with_clues(embeds, rows, clue_embeds)
    arguments = {"inputs_embeds": embeds, "attention_mask": rows.mask, "use_cache": False}
    # those of padding may lie past a learned position table, and past where a rotary table becomes another
    positions = rows.positions.clamp_max(rows.end - 1)
    if prefix is not None:
        prefix_mask = prefix.mask(engine.device)
        if prefix_rows is not None:
            prefix_mask = prefix_mask[prefix_rows]
        arguments |= {
            "attention_mask": torch.cat([prefix_mask, rows.mask], dim=1),
            engine.cache_argument: shared_cache(prefix, prefix_rows),
            "use_cache": True,
        }
    if engine.takes_positions:
        arguments["position_ids"] = positions
    if prefix is None:
        return _run(engine, engine.decoder, arguments, rows)
    with engine.row_wise.only(rows.read, (B, L)), engine.attention.active(), engine.norms.active():
        return _run(engine, engine.suffix_decoder, arguments, rows)


def _run(engine: Engine, decoder, arguments: dict, rows: Rows) -> Tensor:
    if engine.head.fused:
        return decoder(**arguments).last_hidden_state.flatten(0, 1)[rows.before_query]
    keep = torch.zeros(rows.ids.numel(), dtype=torch.bool, device=rows.ids.device)
    keep[rows.before_query] = True
    logits = engine.lm(**arguments, logits_to_keep=keep.view_as(rows.ids)).logits
    logits = logits.reshape(-1, logits.shape[-1])
    return logits[rows.before_query] if len(logits) == rows.ids.numel() else logits  # an LM may not know what to keep


def with_clues(embeds: Tensor, rows: Rows, clue_embeds: Tensor | None) -> Tensor:
    """Embeddings of the rows, [B, L, D], with the clue vectors in their slots."""
    if clue_embeds is None or not len(clue_embeds):
        return embeds
    return embeds.flatten(0, 1).index_copy(0, rows.clue_slots, clue_embeds.to(embeds.dtype)).view_as(embeds)


def shared_cache(prefix: PrefixKV, rows: Tensor | None) -> Cache:
    """A transformers cache for pairs that read document prefixes.

    rows: the prefix of each pair, int64 [B]; None when pair i reads prefix i.
    """
    return Cache(layers=[_shared_layer(kv, rows, prefix.padded_length) for kv in prefix.layers])


class _ReadOnly:
    """A cache layer that many pairs read and nobody appends to: each use gathers and concatenates anew.

    So the stored prefix stays intact, no expanded copy outlives the layer that reads it, and a checkpointed
    forward may run twice.
    """

    kv: LayerKV
    rows: Tensor | None
    slots: int  # P

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return self._joined(self.kv.keys, key_states), self._joined(self.kv.values, value_states)

    def _joined(self, stored: Tensor | list[Tensor], new: Tensor) -> Tensor:
        """The stored slots of each pair's document, then the new ones: [B, heads, P + L, head width]."""
        if isinstance(stored, list):
            own = stored if self.rows is None else [stored[row] for row in self.rows.tolist()]
            both = left_pad(own, self.slots, room=new.shape[-2])
            both[..., self.slots :, :] = new
            return both
        if self.rows is None:
            return torch.cat([stored, new], dim=-2)
        with_grad = torch.is_grad_enabled() and (stored.requires_grad or new.requires_grad)
        if with_grad or torch.compiler.is_compiling():  # which knows no ``out`` that is a part of a tensor
            return torch.cat([stored.index_select(0, self.rows), new], dim=-2)
        P = stored.shape[-2]  # one copy instead of two: 1.6 times faster
        both = new.new_empty(*new.shape[:-2], P + new.shape[-2], new.shape[-1])
        torch.index_select(stored, 0, self.rows, out=both[..., :P, :])
        both[..., P:, :] = new
        return both


class _ReadOnlyLayer(_ReadOnly, DynamicLayer):
    def get_seq_length(self) -> int:
        return self.slots


class _ReadOnlySlidingLayer(_ReadOnly, DynamicSlidingWindowLayer):
    pass


def _shared_layer(kv: LayerKV | None, rows: Tensor | None, length: int) -> DynamicLayer:
    if kv is None:
        return DynamicLayer()
    layer = _ReadOnlyLayer() if kv.window is None else _ReadOnlySlidingLayer(kv.window)
    some = kv.keys[0] if isinstance(kv.keys, list) else kv.keys
    layer.lazy_initialization(some, some)
    layer.kv, layer.rows, layer.slots = kv, rows, length
    if kv.window is not None:
        layer.cumulative_length = length  # tokens seen, of which the layer kept the last window - 1
        layer.slots = min(length, kv.window - 1)
    return layer
