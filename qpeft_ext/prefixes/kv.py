"""Keys and values of document prefixes: taken from a prefix pass, stored one by one, put together for a suffix pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from ..utils.memory import in_large_pages
from .dtypes import KV_DTYPES
from .int8 import Int8Tensor, int8_bytes, int8_views


@dataclass
class LayerKV:
    """Keys and values of one layer of N prefixes, and its sliding window, if any.

    Attributes:
        keys, values: [N, heads, P, head width], as the LM gives them or as they are stored.
        window: tokens that the layer attends to; None: all.
    """

    keys: Tensor | Int8Tensor
    values: Tensor | Int8Tensor
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

    def mask(self, device: torch.device, rows: Tensor | None = None) -> Tensor:
        """Left-padded attention mask of pairs, int64 [B, P].

        Args:
            device: where it goes.
            rows: the prefix of each pair, int64 [B]; None when pair i reads prefix i.
        """
        slots = torch.arange(self.padded_length, device=device)
        lengths = torch.tensor(self.lengths, device=device)
        mask = (slots >= self.padded_length - lengths[:, None]).long()
        return mask if rows is None else mask[rows]


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
        if self.flat is not None:
            return self.flat.nbytes
        return sum(t.nbytes for kv in self.layers if kv for t in (kv.keys, kv.values))

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

    def split(self, dtype: torch.dtype | None = None) -> list[PrefixKV]:
        """One unpadded `PrefixKV` for each prefix, in memory of its own.

        Args:
            dtype: in which they are stored; None: that of the layers, which must not be int8.
        """
        packing = Packing.of(self)
        return [self._unpadded(i, replace(packing, dtype=dtype or packing.dtype)) for i in range(len(self.lengths))]

    def _unpadded(self, i: int, packing: Packing) -> PrefixKV:
        """A copy of prefix i: in one block, or one block a layer where they lie on several devices."""
        length = self.lengths[i]
        copied = packing.empty(length, [kv.keys.device if kv else None for kv in self.layers])
        for own, kv in zip(copied.layers, self.layers, strict=True):
            if own and kv and isinstance(kv.keys, Tensor) and isinstance(kv.values, Tensor):
                own.keys.copy_(_tail(kv.keys[i : i + 1], length))
                own.values.copy_(_tail(kv.values[i : i + 1], length))
        return copied

    @classmethod
    def collate(cls, prefixes: Sequence[PrefixKV], dtype: torch.dtype | None = None) -> PrefixKV:
        """Put prefixes that are stored one by one together, left-padded with zeros that are never attended to.

        Args:
            prefixes: with layers of the same shapes and dtype.
            dtype: of the result; None: that of the prefixes.
        """
        if len(prefixes) == 1 and dtype in (None, Packing.of(prefixes[0]).dtype):
            return prefixes[0]
        layers: list[LayerKV | None] = []
        for rows in zip(*(prefix.layers for prefix in prefixes), strict=True):
            kvs = [kv for kv in rows if kv is not None]
            keys, values = [kv.keys for kv in kvs], [kv.values for kv in kvs]
            both = (left_pad(keys, dtype=dtype), left_pad(values, dtype=dtype)) if kvs else None
            layers.append(both and LayerKV(*both, kvs[0].window))
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

    def of_pairs(self, order: Sequence[int]) -> tuple[SeparatePrefixes, list[int]]:
        """The prefixes that some pairs read, each once, and the place of each pair's among them.

        Args:
            order: the place of each pair's among all.
        """
        places = {prefix: i for i, prefix in enumerate(dict.fromkeys(order))}
        return SeparatePrefixes([self.prefixes[prefix] for prefix in places]), [places[prefix] for prefix in order]


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

    def stored_as(self, kv_dtype: str | None) -> Packing:
        """The packing of the same layers in another dtype, a key of `KV_DTYPES`; None: this one."""
        return self if kv_dtype is None else replace(self, dtype=KV_DTYPES[kv_dtype])

    def other_dtype(self, kv_dtype: str | None) -> str | None:
        """``kv_dtype``, a key of `KV_DTYPES`, where it is another dtype than this one; else None."""
        return None if self.stored_as(kv_dtype) == self else kv_dtype

    def numel(self, length: int) -> int:
        """Numbers in the keys and values of a prefix of ``length`` tokens; bytes for int8, which has scales too."""
        return sum(self._layer_numel(layer, length) for layer in self.layers if layer)

    def nbytes(self, length: int) -> int:
        return self.numel(length) * self.dtype.itemsize

    def unpack(self, flat: Tensor, length: int) -> PrefixKV:
        """A prefix whose layers are views of ``flat`` [numel(length)]."""
        layers: list[LayerKV | None] = []
        start = 0
        for layer in self.layers:
            end = start + (self._layer_numel(layer, length) if layer else 0)
            layers.append(self._layer(flat[start:end], layer, length) if layer else None)
            start = end
        return PrefixKV(layers, [length], flat)

    def empty(self, length: int, devices: Sequence[torch.device | None]) -> PrefixKV:
        """A prefix in memory that nothing is written to yet.

        Args:
            length: tokens of the prefix.
            devices: of each layer; None for one that stores nothing.
        """
        if len({device for device in devices if device}) == 1:
            device = next(device for device in devices if device)
            flat = torch.empty(self.numel(length), dtype=self.dtype, device=device)
            return self.unpack(in_large_pages(flat), length)
        layers: list[LayerKV | None] = []
        for layer, own in zip(self.layers, devices, strict=True):
            numel = self._layer_numel(layer, length) if layer else 0
            block = torch.empty(numel, dtype=self.dtype, device=own)
            layers.append(self._layer(block, layer, length) if layer else None)
        return PrefixKV(layers, [length])

    def _layer_numel(self, layer: LayerShape, length: int) -> int:
        heads, key_width, value_width, window = layer
        slots = _kept(length, window)
        if self.dtype == torch.int8:
            return int8_bytes(heads, slots, key_width, value_width)
        return heads * slots * (key_width + value_width)

    def _layer(self, block: Tensor, layer: LayerShape, length: int) -> LayerKV:
        """Keys and values of a layer, as views of ``block`` [_layer_numel(layer, length)]."""
        heads, key_width, value_width, window = layer
        slots = _kept(length, window)
        if self.dtype == torch.int8:
            return LayerKV(*int8_views(block, heads, slots, key_width, value_width), window)
        middle = heads * slots * key_width
        keys, values = block[:middle], block[middle:]
        return LayerKV(keys.view(1, heads, slots, key_width), values.view(1, heads, slots, value_width), window)


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


def left_pad(
    tensors: Sequence[Tensor | Int8Tensor], length: int | None = None, room: int = 0, dtype: torch.dtype | None = None
) -> Tensor:
    """Tensors [1, heads, P_i, width] as one of [N, heads, length + room, width].

    Args:
        tensors: N of them; one may be there several times.
        length: the padded length; None: the longest P_i.
        room: slots at the end that stay uninitialised.
        dtype: of the result; None: theirs.
    """
    first = tensors[0]
    length = max(t.shape[-2] for t in tensors) if length is None else length
    shape = (len(tensors), first.shape[1], length + room, first.shape[-1])
    padded = torch.empty(shape, dtype=dtype or first.dtype, device=first.device)
    done: dict[int, Tensor] = {}
    for row, tensor in zip(padded.split(1), tensors, strict=True):
        gap = length - tensor.shape[-2]
        row[:, :, :gap] = 0  # masked, but NaN times zero would still be NaN
        own = row[:, :, gap:length]
        if id(tensor) in done:  # one that is stored in another dtype is converted once
            own.copy_(done[id(tensor)])
        elif isinstance(tensor, Int8Tensor):
            tensor.read_into(own)
        else:
            own.copy_(tensor)
        done[id(tensor)] = own
    return padded
