"""Key/value caches of document prefixes: taken from a prefix pass, stored one by one, collated."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from ..lm.state import LMVersion


@dataclass
class LayerKV:
    """Keys and values of one layer, [N, heads, P, head width]; ``window`` is the sliding window, if any.

    Or N prefixes that lie by themselves, lists of [1, heads, P_i, head width]: see `PrefixKV.side_by_side`.
    """

    keys: Tensor | list[Tensor]
    values: Tensor | list[Tensor]
    window: int | None


@dataclass
class PrefixKV:
    """The caches of N left-padded prefixes.

    layers: one `LayerKV` a layer (None for a layer that stores nothing, because it shares another's keys).
    lengths: true prefix lengths, N ints; the longest is the padded length P. A sliding layer keeps only its
        last min(P, window - 1) slots.
    flat: of a single prefix that was stored: the memory of all its layers, one after another (`Layout`), so that it
        moves in one copy. None for a batch, and where the layers lie on several devices.
    ready: the event after which ``flat`` may be read by the CPU, while a copy from a CUDA device is under way.
    """

    layers: list[LayerKV | None]
    lengths: list[int]
    flat: Tensor | None = None
    ready: torch.cuda.Event | None = None

    @property
    def padded_length(self) -> int:
        return max(self.lengths)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for kv in self.layers if kv for t in (kv.keys, kv.values))

    @classmethod
    def from_cache(cls, cache: Cache, lengths: Sequence[int], leading: int = 0) -> PrefixKV:
        """Keys and values of a finished pass over left-padded prefixes; padding left of the longest one is dropped.

        Args:
            lengths: tokens of each prefix.
            leading: the first slots of each row that belong to its prefix, before the padding.
        Raises: TypeError for a layer that stores anything else.
        """
        layers: list[LayerKV | None] = []
        for layer in cache.layers:
            if not isinstance(layer, DynamicLayer) or type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise TypeError(f"a {type(layer).__name__} cannot be shared between queries")
            if layer.keys is None or layer.values is None:
                layers.append(None)
                continue
            window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
            keys, values = (_tail(_pads_first(x, lengths, leading), max(lengths)) for x in (layer.keys, layer.values))
            layers.append(LayerKV(keys, values, window))
        return cls(layers, list(lengths))

    def split(self) -> list[PrefixKV]:
        """One unpadded `PrefixKV` for each prefix, in memory of its own."""
        layout = Layout.of(self)
        several_devices = len({kv.keys.device for kv in self.layers if kv}) > 1
        return [self._alone(i, None if several_devices else layout) for i in range(len(self.lengths))]

    def _alone(self, i: int, layout: Layout | None) -> PrefixKV:
        length = self.lengths[i]
        rows = [
            kv and LayerKV(_tail(kv.keys[i : i + 1], length), _tail(kv.values[i : i + 1], length), kv.window)
            for kv in self.layers
        ]
        if layout is None:
            return PrefixKV([kv and LayerKV(kv.keys.clone(), kv.values.clone(), kv.window) for kv in rows], [length])
        device = next(kv.keys.device for kv in rows if kv)
        alone = layout.unpack(torch.empty(layout.numel(length), dtype=layout.dtype, device=device), length)
        for own, row in zip(alone.layers, rows, strict=True):
            if row:
                own.keys.copy_(row.keys)
                own.values.copy_(row.values)
        return alone

    @classmethod
    def collate(cls, prefixes: Sequence[PrefixKV]) -> PrefixKV:
        """Caches stored one by one as one left-padded batch: zeros on the left are never attended to. One copy."""
        if len(prefixes) == 1:
            return prefixes[0]
        layers = []
        for kvs in zip(*(prefix.layers for prefix in prefixes), strict=True):
            if kvs[0] is None:
                layers.append(None)
                continue
            keys, values = (left_pad([getattr(kv, name) for kv in kvs]) for name in ("keys", "values"))
            layers.append(LayerKV(keys, values, kvs[0].window))
        return cls(layers, [length for prefix in prefixes for length in prefix.lengths])

    @classmethod
    def side_by_side(cls, prefixes: Sequence[PrefixKV]) -> PrefixKV:
        """As `collate`, but nothing is copied until a layer is read: then each pair's keys are put together at once."""
        if len(prefixes) == 1:
            return prefixes[0]
        layers = [
            kvs[0] and LayerKV([kv.keys for kv in kvs], [kv.values for kv in kvs], kvs[0].window)
            for kvs in zip(*(prefix.layers for prefix in prefixes), strict=True)
        ]
        return cls(layers, [length for prefix in prefixes for length in prefix.lengths])

    def mask(self, device) -> Tensor:
        """Left-padded attention mask, int64 [N, P]."""
        slots = torch.arange(self.padded_length, device=device)
        lengths = torch.tensor(self.lengths, device=device)
        return (slots >= self.padded_length - lengths[:, None]).long()


@dataclass(frozen=True)
class Layout:
    """How an LM's keys and values of one prefix lie in one flat tensor: layer after layer, keys before values.

    layers: (heads, width of a key, width of a value, window or None) a layer; None for one that stores nothing.
    """

    layers: tuple[tuple[int, int, int, int | None] | None, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, prefix: PrefixKV) -> Layout:
        """Raises: TypeError where the layers have several dtypes."""
        dtypes = {t.dtype for kv in prefix.layers if kv for t in (kv.keys, kv.values)}
        if len(dtypes) != 1:
            raise TypeError(f"keys and values must have one dtype, got {sorted(map(str, dtypes))}")
        layers = tuple(
            kv and (kv.keys.shape[1], kv.keys.shape[-1], kv.values.shape[-1], kv.window) for kv in prefix.layers
        )
        return cls(layers, dtypes.pop())

    def numel(self, length: int) -> int:
        """Numbers in the cache of a prefix of ``length`` tokens."""
        return sum(
            heads * _kept(length, window) * (key + value) for heads, key, value, window in filter(None, self.layers)
        )

    def nbytes(self, length: int) -> int:
        return self.numel(length) * self.dtype.itemsize

    def unpack(self, flat: Tensor, length: int) -> PrefixKV:
        """A prefix whose layers are views of ``flat`` [numel(length)]."""
        layers, start = [], 0
        for layer in self.layers:
            if layer is None:
                layers.append(None)
                continue
            heads, *widths, window = layer
            parts = []
            for width in widths:
                shape = (1, heads, _kept(length, window), width)
                end = start + heads * shape[2] * width
                parts.append(flat[start:end].view(shape))
                start = end
            layers.append(LayerKV(*parts, window))
        return PrefixKV(layers, [length], flat)


def _kept(length: int, window: int | None) -> int:
    """Slots that a layer keeps of a prefix."""
    return length if window is None else min(length, window - 1)


def _tail(tensor: Tensor, length: int) -> Tensor:
    more = tensor.shape[-2] - length
    return tensor[..., more:, :] if more > 0 else tensor


def _pads_first(tensor: Tensor, lengths: Sequence[int], leading: int) -> Tensor:
    """Slots [leading, pads, text] of ``tensor`` [N, heads, slots, width] in the order [pads, leading, text]."""
    if not leading:
        return tensor
    slots = torch.arange(tensor.shape[2], device=tensor.device)
    pads = tensor.shape[2] - torch.tensor(lengths, device=tensor.device)[:, None]
    source = torch.where(slots < pads, slots + leading, torch.where(slots < pads + leading, slots - pads, slots))
    return tensor.gather(2, source[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))


def left_pad(tensors: Sequence[Tensor], length: int | None = None, room: int = 0) -> Tensor:
    """Tensors [1, heads, P_i, width] as one of [N, heads, length + room, width]; ``room`` slots at the end stay empty.

    length: None: the longest P_i.
    """
    first = tensors[0]
    length = max(t.shape[-2] for t in tensors) if length is None else length
    padded = first.new_empty(len(tensors), first.shape[1], length + room, first.shape[-1])
    for row, tensor in zip(padded, tensors, strict=True):
        gap = length - tensor.shape[-2]
        row[:, :gap] = 0  # masked, but NaN times zero would still be NaN
        row[:, gap:length] = tensor[0]
    return padded


class PrefixKey(NamedTuple):
    """What a cached prefix is of.

    model: the version of the LM.  digest: SHA-256 of the prefix ids.  length: how many there are.
    alone: computed alone and unpadded (``deterministic=True``), which differs in the last bits.
    """

    model: LMVersion
    digest: bytes
    length: int
    alone: bool


def prefix_digest(prefix_ids: Sequence[int]) -> bytes:
    """SHA-256 of the ids of a prefix."""
    return hashlib.sha256(np.asarray(prefix_ids, dtype=np.int64).tobytes()).digest()
