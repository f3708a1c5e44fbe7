"""A transformers cache that many pairs read and nobody appends to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from ..ops.joined_prefixes import is_supported, joined_prefixes
from ..prefixes.int8 import Int8Tensor
from ..prefixes.kv import PrefixBatch, PrefixKV, SeparatePrefixes, left_pad

_Stored = Tensor | list[Tensor | Int8Tensor]  # of all prefixes in the LM's dtype, or of each as it is stored


def shared_cache(prefixes: PrefixBatch, rows: Tensor | None) -> Cache:
    """Make a transformers cache for pairs that read document prefixes.

    Args:
        prefixes: a `PrefixKV` in the LM's dtype, or `SeparatePrefixes` in any.
        rows: the prefix of each pair, int64 [B]; None when pair i reads prefix i.
    """
    return Cache(
        layers=[
            DynamicLayer() if stored is None else _shared_layer(*stored, rows, prefixes.padded_length)
            for stored in _layers(prefixes)
        ]
    )


def _layers(prefixes: PrefixBatch) -> Iterator[tuple[int | None, _Stored, _Stored] | None]:
    """Window, keys and values of each layer; None for one that stores nothing."""
    if isinstance(prefixes, PrefixKV):
        for kv in prefixes.layers:
            if kv is None:
                yield None
                continue
            assert isinstance(kv.keys, Tensor) and isinstance(kv.values, Tensor), "`collate` converts"
            yield kv.window, kv.keys, kv.values
    elif isinstance(prefixes, SeparatePrefixes):
        for of_all in zip(*(prefix.layers for prefix in prefixes.prefixes), strict=True):
            kvs = [kv for kv in of_all if kv]
            yield (kvs[0].window, [kv.keys for kv in kvs], [kv.values for kv in kvs]) if kvs else None


class _ReadOnly:
    """A cache layer that many pairs read and nobody appends to: every read gathers and concatenates anew.

    So the stored prefix stays intact, no expanded copy outlives the layer that reads it, and a forward pass may run
    again in the backward pass. What is stored in another dtype is converted on the way.
    """

    stored: tuple[_Stored, _Stored]  # keys and values
    rows: Tensor | None
    slots: int  # P

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        keys, values = self.stored
        return self._joined(keys, key_states), self._joined(values, value_states)

    def _joined(self, stored: _Stored, new: Tensor) -> Tensor:
        """Concatenate the stored slots of each pair's document and the new ones: [B, heads, P + L, head width]."""
        if isinstance(stored, list):
            rows = range(len(stored)) if self.rows is None else self.rows.tolist()
            if is_supported(stored, new) and not torch.compiler.is_compiling():
                return joined_prefixes(cast(list[Tensor], stored), rows, new, self.slots)
            own = [stored[row] for row in rows]
            both = left_pad(own, self.slots, room=new.shape[-2], dtype=new.dtype)
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


def _shared_layer(window: int | None, keys: _Stored, values: _Stored, rows: Tensor | None, length: int) -> DynamicLayer:
    layer = _ReadOnlyLayer() if window is None else _ReadOnlySlidingLayer(window)
    empty = torch.empty(0, device=(keys[0] if isinstance(keys, list) else keys).device)
    layer.lazy_initialization(empty, empty)
    layer.stored, layer.rows, layer.slots = (keys, values), rows, length
    if window is not None:
        layer.cumulative_length = length  # tokens seen, of which the layer kept the last window - 1
        layer.slots = min(length, window - 1)
    return layer
