"""A transformers cache that many pairs read and nobody appends to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from ..prefixes.kv import LayerKV, PrefixBatch, PrefixKV, SeparatePrefixes, left_pad


def shared_cache(prefixes: PrefixBatch, rows: Tensor | None) -> Cache:
    """Make a transformers cache for pairs that read document prefixes.

    Args:
        prefixes: a `PrefixKV` or `SeparatePrefixes`.
        rows: the prefix of each pair, int64 [B]; None when pair i reads prefix i.
    """
    parts = prefixes.prefixes if isinstance(prefixes, SeparatePrefixes) else [prefixes]
    layers = zip(*(part.layers for part in parts if isinstance(part, PrefixKV)), strict=True)
    return Cache(layers=[_shared_layer(kvs, rows, prefixes.padded_length) for kvs in layers])


class _ReadOnly:
    """A cache layer that many pairs read and nobody appends to: every read gathers and concatenates anew.

    So the stored prefix stays intact, no expanded copy outlives the layer that reads it, and a forward pass may run
    again in the backward pass.
    """

    stored: tuple[Tensor | list[Tensor], Tensor | list[Tensor]]  # keys and values, of all prefixes or of each
    rows: Tensor | None
    slots: int  # P

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        keys, values = self.stored
        return self._joined(keys, key_states), self._joined(values, value_states)

    def _joined(self, stored: Tensor | list[Tensor], new: Tensor) -> Tensor:
        """Concatenate the stored slots of each pair's document and the new ones: [B, heads, P + L, head width]."""
        if isinstance(stored, list):
            own = stored if self.rows is None else [stored[row] for row in self.rows.tolist()]
            both = left_pad(own, self.slots, room=new.shape[-2])
            both[..., self.slots :, :] = new
            return both
        if self.rows is None:
            return torch.cat([stored, new], dim=-2)
        with_grad = torch.is_grad_enabled() and (stored.requires_grad or new.requires_grad)
        if with_grad or torch.compiler.is_compiling():  # torch.compile takes no view as ``out``
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


def _shared_layer(parts: Sequence[LayerKV | None], rows: Tensor | None, length: int) -> DynamicLayer:
    """Make a layer of the cache, from one `LayerKV` of all prefixes or from one of each."""
    kvs = [kv for kv in parts if kv is not None]
    if not kvs:
        return DynamicLayer()
    first = kvs[0]
    layer = _ReadOnlyLayer() if first.window is None else _ReadOnlySlidingLayer(first.window)
    layer.lazy_initialization(first.keys, first.keys)
    layer.stored = (first.keys, first.values) if len(kvs) == 1 else ([kv.keys for kv in kvs], [kv.values for kv in kvs])
    layer.rows, layer.slots = rows, length
    if first.window is not None:
        layer.cumulative_length = length  # tokens seen, of which the layer kept the last window - 1
        layer.slots = min(length, first.window - 1)
    return layer
