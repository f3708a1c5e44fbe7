"""Key/value caches of document prefixes: taken from a prefix pass, stored one by one, collated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer


@dataclass
class LayerKV:
    """Keys and values of one layer, [N, heads, P, head width]; ``window`` is the sliding window, if any."""

    keys: Tensor
    values: Tensor
    window: int | None


@dataclass
class PrefixKV:
    """The caches of N left-padded prefixes.

    layers: one `LayerKV` a layer (None for a layer that stores nothing, because it shares another's keys).
    lengths: true prefix lengths, N ints; the longest is the padded length P. A sliding layer keeps only its
        last min(P, window - 1) slots.
    """

    layers: list[LayerKV | None]
    lengths: list[int]

    @property
    def padded_length(self) -> int:
        return max(self.lengths)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for kv in self.layers if kv for t in (kv.keys, kv.values))

    @classmethod
    def from_cache(cls, cache: Cache, lengths: Sequence[int]) -> PrefixKV:
        layers = []
        for layer in cache.layers:
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise TypeError(f"a {type(layer).__name__} cannot be shared between queries")
            window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
            layers.append(LayerKV(layer.keys, layer.values, window) if layer.is_initialized else None)
        return cls(layers, list(lengths))

    def split(self) -> list[PrefixKV]:
        """One unpadded `PrefixKV` for each prefix, in memory of its own."""
        return [
            PrefixKV(
                [
                    kv and LayerKV(*(_tail(t[i : i + 1], length) for t in (kv.keys, kv.values)), kv.window)
                    for kv in self.layers
                ],
                [length],
            )
            for i, length in enumerate(self.lengths)
        ]

    @classmethod
    def collate(cls, prefixes: Sequence[PrefixKV]) -> PrefixKV:
        """Caches stored one by one as one left-padded batch: zeros on the left are never attended to."""
        if len(prefixes) == 1:
            return prefixes[0]
        layers = []
        for kvs in zip(*(prefix.layers for prefix in prefixes), strict=True):
            if kvs[0] is None:
                layers.append(None)
                continue
            keys, values = (_left_pad([getattr(kv, name) for kv in kvs]) for name in ("keys", "values"))
            layers.append(LayerKV(keys, values, kvs[0].window))
        return cls(layers, [length for prefix in prefixes for length in prefix.lengths])

    def mask(self, device) -> Tensor:
        """Left-padded attention mask, int64 [N, P]."""
        slots = torch.arange(self.padded_length, device=device)
        lengths = torch.tensor(self.lengths, device=device)
        return (slots >= self.padded_length - lengths[:, None]).long()


def _tail(tensor: Tensor, length: int) -> Tensor:
    kept = min(length, tensor.shape[-2])
    return tensor[..., tensor.shape[-2] - kept :, :].clone(memory_format=torch.contiguous_format)


def _left_pad(tensors: list[Tensor]) -> Tensor:
    first, length = tensors[0], max(t.shape[-2] for t in tensors)
    padded = first.new_zeros(len(tensors), first.shape[1], length, first.shape[-1])
    for row, tensor in zip(padded, tensors, strict=True):
        row[:, length - tensor.shape[-2] :] = tensor[0]
    return padded
