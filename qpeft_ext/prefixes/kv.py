"""Keys and values of document prefixes: taken from a prefix pass, stored one by one, put together for a suffix pass."""

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
    """Keys and values of one layer of N prefixes, and its sliding window, if any.

    Attributes:
        keys, values: [N, heads, P, head width].
        window: tokens that the layer attends to; None: all.
    """

    keys: Tensor
    values: Tensor
    window: int | None


class PrefixBatch:
    """Keys and values of N prefixes for a suffix pass: `PrefixKV`, or `SeparatePrefixes`.

    Attributes:
        lengths: tokens of each prefix, N ints; the longest is the padded length P.
    """

    lengths: list[int]

    @property
    def padded_length(self) -> int:
        return max(self.lengths)

    def mask(self, device: torch.device) -> Tensor:
        """Left-padded attention mask, int64 [N, P]."""
        slots = torch.arange(self.padded_length, device=device)
        lengths = torch.tensor(self.lengths, device=device)
        return (slots >= self.padded_length - lengths[:, None]).long()


@dataclass
class PrefixKV(PrefixBatch):
    """Keys and values of N left-padded prefixes.

    Attributes:
        layers: one `LayerKV` a layer; None for a layer that stores nothing, because it shares another's keys. A sliding
            layer has only its last min(P, window - 1) slots.
        lengths: tokens of each prefix, N ints; the longest is the padded length P.
        flat: for a single prefix in the cache, the memory of all its layers one after another (`Packing`), so that it
            moves in one copy. None for a batch, and where the layers lie on several devices.
        ready: the event after which the CPU may read ``flat``, while a copy from a CUDA device is under way.
    """

    layers: list[LayerKV | None]
    lengths: list[int]
    flat: Tensor | None = None
    ready: torch.cuda.Event | None = None

    @property
    def block(self) -> Tensor:
        """``flat``, which is there.

        Raises: ValueError if the layers do not lie one after another.
        """
        if self.flat is None:
            raise ValueError("expected a prefix in one block of memory, got one whose layers lie apart")
        return self.flat

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for kv in self.layers if kv for t in (kv.keys, kv.values))

    @classmethod
    def from_cache(cls, cache: Cache, lengths: Sequence[int], leading: int = 0) -> PrefixKV:
        """Keys and values of a finished pass over left-padded prefixes; padding left of the longest one is dropped.

        Args:
            cache: what the pass has filled.
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
        packing = Packing.of(self)
        several_devices = len({kv.keys.device for kv in self.layers if kv}) > 1
        return [self._unpadded(i, None if several_devices else packing) for i in range(len(self.lengths))]

    def _unpadded(self, i: int, packing: Packing | None) -> PrefixKV:
        """A copy of prefix i, in one block where ``packing`` is given."""
        length = self.lengths[i]
        rows = [
            kv and LayerKV(_tail(kv.keys[i : i + 1], length), _tail(kv.values[i : i + 1], length), kv.window)
            for kv in self.layers
        ]
        if packing is None:
            return PrefixKV([kv and LayerKV(kv.keys.clone(), kv.values.clone(), kv.window) for kv in rows], [length])
        device = next(kv.keys.device for kv in rows if kv)
        copied = packing.unpack(torch.empty(packing.numel(length), dtype=packing.dtype, device=device), length)
        for own, row in zip(copied.layers, rows, strict=True):
            if own and row:
                own.keys.copy_(row.keys)
                own.values.copy_(row.values)
        return copied

    @classmethod
    def collate(cls, prefixes: Sequence[PrefixKV]) -> PrefixKV:
        """Put prefixes that are stored one by one together, left-padded with zeros that are never attended to."""
        if len(prefixes) == 1:
            return prefixes[0]
        layers: list[LayerKV | None] = []
        for rows in zip(*(prefix.layers for prefix in prefixes), strict=True):
            kvs = [kv for kv in rows if kv is not None]
            keys, values = [kv.keys for kv in kvs], [kv.values for kv in kvs]
            layers.append(LayerKV(left_pad(keys), left_pad(values), kvs[0].window) if kvs else None)
        return cls(layers, [length for prefix in prefixes for length in prefix.lengths])


class SeparatePrefixes(PrefixBatch):
    """Several stored prefixes, each where it lies.

    A suffix pass puts the keys of each pair together when it comes to a layer, which saves the copy of `collate`.

    Args:
        prefixes: each of one document.
    """

    def __init__(self, prefixes: Sequence[PrefixKV]) -> None:
        self.prefixes = list(prefixes)
        self.lengths = [length for prefix in prefixes for length in prefix.lengths]


LayerShape = tuple[int, int, int, int | None]  # heads, width of a key, width of a value, sliding window


@dataclass(frozen=True)
class Packing:
    """How an LM's keys and values of one prefix lie in one flat tensor: layer after layer, keys before values.

    Attributes:
        layers: the shape of each layer; None for one that stores nothing.
        dtype: of all layers.
    """

    layers: tuple[LayerShape | None, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, prefix: PrefixKV) -> Packing:
        """The packing of prefixes like this one.

        Raises: TypeError where the layers have several dtypes.
        """
        dtypes = {t.dtype for kv in prefix.layers if kv for t in (kv.keys, kv.values)}
        if len(dtypes) != 1:
            raise TypeError(f"keys and values must have one dtype, got {sorted(map(str, dtypes))}")
        layers = tuple(
            None if kv is None else (kv.keys.shape[1], kv.keys.shape[-1], kv.values.shape[-1], kv.window)
            for kv in prefix.layers
        )
        return cls(layers, dtypes.pop())

    def numel(self, length: int) -> int:
        """Numbers in the keys and values of a prefix of ``length`` tokens."""
        return sum(
            heads * _kept(length, window) * (key + value) for heads, key, value, window in filter(None, self.layers)
        )

    def nbytes(self, length: int) -> int:
        return self.numel(length) * self.dtype.itemsize

    def unpack(self, flat: Tensor, length: int) -> PrefixKV:
        """A prefix whose layers are views of ``flat`` [numel(length)]."""
        layers: list[LayerKV | None] = []
        start = 0
        for layer in self.layers:
            if layer is None:
                layers.append(None)
                continue
            heads, key_width, value_width, window = layer
            slots = _kept(length, window)
            middle, end = start + heads * slots * key_width, start + heads * slots * (key_width + value_width)
            keys = flat[start:middle].view(1, heads, slots, key_width)
            layers.append(LayerKV(keys, flat[middle:end].view(1, heads, slots, value_width), window))
            start = end
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
    """Tensors [1, heads, P_i, width] as one of [N, heads, length + room, width].

    Args:
        tensors: N of them.
        length: the padded length; None: the longest P_i.
        room: slots at the end that stay uninitialised.
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
    """The identity of a cached prefix.

    Attributes:
        model: the version of the LM.
        digest: SHA-256 of the prefix ids.
        length: how many ids there are.
        deterministic: whether it was computed unpadded in a pass of its own, which changes the last bits.
    """

    model: LMVersion
    digest: bytes
    length: int
    deterministic: bool


def prefix_digest(prefix_ids: Sequence[int]) -> bytes:
    """SHA-256 of the ids of a prefix."""
    return hashlib.sha256(np.asarray(prefix_ids, dtype=np.int64).tobytes()).digest()
