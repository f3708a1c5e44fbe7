"""`DocumentCache`: keys and values of document prefixes, kept between calls."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ..lm.state import LMState, LMVersion
from .copies import Copies, copies
from .dtypes import expect_kv_dtype
from .files import Extent, prefetch, read_prefix
from .index import PrefixIndex
from .keys import PrefixKey, prefix_digest
from .kv import Packing, PrefixKV
from .manifest import other_kv_dtype
from .tiers import DiskTier, FileTier, HostTier, MemoryTier, Tier

logger = logging.getLogger(__name__)


class DocumentCache:
    """Keys and values of document prefixes, kept between calls in tiers, each under a budget in bytes.

    Tiers, from the top: ``device`` (memory of the model's device), ``host`` (pinned memory for a CUDA model), ``disk``
    (safetensors files, found again by the next process), ``index`` (made by ``qpeft index``, only read). The least
    recently used prefixes of a tier move to the one below when it is full; what is found below moves up. Files stay
    where they are.

    A prefix is known by the exact LM (its parameters, adapters in it, dtype) and by a SHA-256 of its token *ids*, so a
    document whose text, template or truncation changed is not found, whatever its ``doc_id``. Files know the LM by a
    hash of its content, computed once a process (about 0.55 s per GB). Several threads must not use a cache at once;
    rerankers take turns.

    With a ``kv_dtype`` of fewer bits than the LM's, more prefixes fit. They are rounded when they are computed, before
    the first use, so that a score does not depend on what was in the cache, and converted to the LM's dtype while a
    pass reads them. "int8" has scales in float32: for keys by head and channel, for values by token.

    A copy, pickled or deep, has the same settings and starts with nothing in memory. Only one cache at a time can use a
    folder as its disk tier: a copy that finds it in use does without one and logs a warning.

    Args:
        max_bytes: budget for the device tier; 0 stores nothing there.
        host_bytes: budget for the host tier; 0: no such tier.
        disk: a folder for the disk tier; None: no such tier.
        disk_bytes: budget for the disk tier.
        index: a `PrefixIndex`, or the folder of one; None: no such tier.
        kv_dtype: the dtype in which keys and values are stored in every tier: "float32", "bfloat16", "float16" or
            "int8"; None: that of the index, or else the LM's.
    Attributes:
        tiers: `Tier` by name, with hits, misses, evictions, nbytes and max_bytes of each.
        hits: look-ups that found a prefix in some tier.
        misses: look-ups that found none.
        nbytes, evictions, max_bytes: those of the device tier.
    Raises: ValueError for an impossible budget, another kv_dtype, a folder in use, or an index that is not complete or
        has another kv_dtype.
    Example:
        >>> import qpeft_ext as qpeft
        >>> from qpeft_ext.lm.loading import BASE_LM
        >>> model = qpeft.get_qpeft_model(qpeft.load_lm(BASE_LM), qpeft.QPeftConfig(clues="none"))
        >>> reranker = qpeft.Reranker(model, cache=qpeft.DocumentCache(64 << 20))
        >>> documents = ["The moon causes the tides.", "Boats need a harbour."]
        >>> for query in ("why are there tides?", "where do boats go?"):
        ...     ranking = reranker.rank(query, documents)
        >>> len(reranker.cache), reranker.cache.misses  # each document was read once, for both queries
        (2, 2)
    """

    def __init__(
        self,
        max_bytes: int = 1 << 30,
        host_bytes: int = 0,
        disk: str | os.PathLike | None = None,
        disk_bytes: int = 0,
        index: PrefixIndex | str | os.PathLike | None = None,
        kv_dtype: str | None = None,
    ) -> None:
        expect_kv_dtype(kv_dtype, "DocumentCache: kv_dtype")
        for name, value in (("max_bytes", max_bytes), ("host_bytes", host_bytes), ("disk_bytes", disk_bytes)):
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"DocumentCache: {name} must be a whole number ≥ 0, got {value!r}")
        if (disk is None) != (disk_bytes == 0):
            raise ValueError(f"DocumentCache: disk and disk_bytes belong together, got {disk!r} and {disk_bytes}")
        self.index = index if index is None or isinstance(index, PrefixIndex) else PrefixIndex(index)
        self.kv_dtype = kv_dtype if self.index is None else self.index.kv_dtype_with(kv_dtype)
        self._device = MemoryTier("device", max_bytes)
        self._host = HostTier(host_bytes) if host_bytes else None
        self._disk = None if disk is None else DiskTier(disk, disk_bytes)
        self._memory: list[MemoryTier] = [tier for tier in (self._device, self._host) if tier is not None]
        self._stores: list[MemoryTier | DiskTier] = [*self._memory, *([self._disk] if self._disk is not None else ())]
        self._files: list[FileTier] = [tier for tier in (self._disk, self.index) if tier is not None]
        self.misses = 0

    def __reduce__(self) -> tuple:
        # keys and values are known by an LM of this process, and an open folder cannot be sent
        disk = (None, 0) if self._disk is None else (self._disk.folder, self._disk.max_bytes)
        host_bytes = 0 if self._host is None else self._host.max_bytes
        return _copied, (self._device.max_bytes, host_bytes, *disk, self.index, self.kv_dtype)

    # -- look-ups and stores --------------------------------------------------------------------------------------

    @staticmethod
    def key(
        model: LMVersion, prefix_ids: Sequence[int], deterministic: bool = False, kv_dtype: str | None = None
    ) -> PrefixKey:
        """The identity of a prefix.

        Args:
            model: the version of the LM that computes it.
            prefix_ids: its token ids.
            deterministic: whether it is computed unpadded in a pass of its own.
            kv_dtype: the dtype that it is stored in, where that is not the LM's own.
        """
        return PrefixKey(model, prefix_digest(prefix_ids), len(prefix_ids), deterministic, kv_dtype)

    def fetch(self, keys: Sequence[PrefixKey], packing: Packing, device: torch.device) -> list[PrefixKV | None]:
        """Look prefixes up, tier by tier, and bring what is found to the device.

        Args:
            keys: their identities.
            packing: how keys and values lie in files, in the dtype of this cache.
            device: the model's.
        Returns: one entry per key, None where nothing is stored.
        Raises: ValueError if the index belongs to another LM or has another dtype.
        """
        link = copies(device)
        found = [self._in_memory(key, link) for key in keys]
        self._read(keys, found, packing, link)
        self.misses += sum(prefix is None for prefix in found)
        return found

    def announce(self, keys: Sequence[PrefixKey]) -> bool:
        """Ask the system to read ahead what `fetch` will want from files, without waiting.

        Args:
            keys: identities of prefixes.
        Returns: whether any of them is in a file and not in memory.
        """
        missing = [key for key in keys if not any(key in memory for memory in self._memory)]
        return any([tier.prefetch(key) for tier in self._files for key in missing])

    def held(self, keys: Sequence[PrefixKey]) -> list[bool]:
        """Tell which prefixes some tier has, without reading or counting them; files begin to be read ahead.

        Args:
            keys: identities of prefixes.
        Returns: one bool per key.
        Raises: ValueError if the index belongs to another LM.
        """
        return [
            any(key in memory for memory in self._memory) or any(tier.prefetch(key) for tier in self._files)
            for key in keys
        ]

    def renew_index(self) -> bool:
        """Open the index again if ``qpeft index`` has completed it anew since, for example with more documents.

        Returns: whether it was opened again.
        Raises: ValueError or OSError if it cannot be read any more; the cache then keeps what it has.
        """
        if self.index is None or not self.index.is_outdated():
            return False
        before, renewed = self.index, PrefixIndex(self.index.folder)
        if renewed.kv_dtype != before.kv_dtype:
            raise other_kv_dtype(renewed.folder, renewed.kv_dtype, before.kv_dtype)
        self.index = renewed
        self.index.hits, self.index.misses = before.hits, before.misses
        self._files = [self.index if tier is before else tier for tier in self._files]
        return True

    def put(self, key: PrefixKey, prefix: PrefixKV) -> None:
        """Store a prefix; the least recently used ones move down, and out of the lowest tier.

        Args:
            key: its identity.
            prefix: one unpadded prefix, as `PrefixKV.split` gives it, in the dtype of this cache.
        """
        self._store(key, prefix, 0)

    def _in_memory(self, key: PrefixKey, link: Copies) -> PrefixKV | None:
        prefix = self._device.get(key)
        if prefix is None and self._host is not None and (below := self._host.get(key)) is not None:
            prefix = link.to_device(below)
            if prefix.nbytes <= self._device.max_bytes:
                self._host.take(key)
                self._store(key, prefix, 0)
        return prefix

    def _store(self, key: PrefixKey, prefix: PrefixKV, level: int) -> None:
        if level == len(self._stores) or level and not (key.model.is_current and prefix.flat is not None):
            return  # there is no tier below; the LM has changed since; or the layers lie on several devices
        for lower_key, lower in self._stores[level].put(key, prefix):
            self._store(lower_key, lower, level + 1)

    def _read(self, keys: Sequence[PrefixKey], found: list[PrefixKV | None], packing: Packing, link: Copies) -> None:
        """Fill the gaps in ``found`` from files."""
        located = self._locate(keys, found, packing)
        # a GPU's copies start from pinned memory; on the CPU passes read the prefixes where they lie
        staging = link.staging(sum(extent.nbytes for _, extent in located.values()) if link.cuda else 0)
        for i, (tier, extent) in located.items():
            if link.cuda:
                buffer, staging = staging[: extent.nbytes], staging[extent.nbytes :]
            else:
                buffer = torch.empty(extent.nbytes, dtype=torch.uint8)
            try:
                read_prefix(extent, buffer)
            except (ValueError, OSError) as error:
                tier.drop(keys[i], error)
            else:
                found[i] = prefix = link.to_device(packing.unpack(buffer.view(packing.dtype), keys[i].length))
                if any(extent.nbytes <= memory.max_bytes for memory in self._memory):
                    self._store(keys[i], prefix, 0)
            tier.count(found[i] is not None)
        if located:
            link.staging_is_read()

    def _locate(
        self, keys: Sequence[PrefixKey], found: Sequence[PrefixKV | None], packing: Packing
    ) -> dict[int, tuple[FileTier, Extent]]:
        """Where in files the prefixes are that are missing in ``found``; the system begins to read them."""
        located: dict[int, tuple[FileTier, Extent]] = {}
        for tier in self._files:
            for i in (i for i, prefix in enumerate(found) if prefix is None and i not in located):
                extent = tier.locate(keys[i])
                expected = packing.nbytes(keys[i].length), packing.dtype
                if extent is not None and (extent.nbytes, extent.dtype) != expected:
                    words = "expected {} bytes of {}, got {} of {}"
                    tier.drop(keys[i], words.format(*expected, extent.nbytes, extent.dtype))
                    extent = None
                if extent is None:
                    tier.count(False)
                else:
                    located[i] = tier, extent
                    prefetch(extent.path, extent.offset, extent.nbytes)
        return located

    # -- what there is --------------------------------------------------------------------------------------------

    @property
    def tiers(self) -> dict[str, Tier]:
        return {tier.name: tier for tier in (*self._stores, *([self.index] if self.index is not None else ()))}

    @property
    def stores(self) -> bool:
        """Does any tier that `put` writes to have a budget?"""
        return any(tier.max_bytes for tier in self._stores)

    @property
    def hits(self) -> int:
        return sum(tier.hits for tier in self.tiers.values())

    @property
    def max_bytes(self) -> int:
        return self._device.max_bytes

    @property
    def nbytes(self) -> int:
        return self._device.nbytes

    @property
    def evictions(self) -> int:
        return self._device.evictions

    def clear(self) -> None:
        """Empty the tiers in memory, and look at every LM anew (after a write through ``parameter.data``).

        Files stay: they are known by content.
        """
        for tier in self._memory:
            tier.clear()
        LMState.look_again()

    def __len__(self) -> int:
        """Prefixes in memory."""
        return sum(map(len, self._memory))

    def __repr__(self) -> str:
        asked = self.hits + self.misses
        rate = f"{self.hits / asked:.0%} hits" if asked else "unused"
        stored = [] if self.kv_dtype is None else [f"keys and values in {self.kv_dtype}"]
        return f"DocumentCache({'; '.join([*stored, *map(str, self.tiers.values())])}; {rate} in all)"


def _copied(
    max_bytes: int, host_bytes: int, disk: Path | None, disk_bytes: int, index: PrefixIndex | None, kv_dtype: str | None
) -> DocumentCache:
    """Return a cache with these settings, without the disk tier if its folder is in use."""
    try:
        return DocumentCache(max_bytes, host_bytes, disk, disk_bytes, index, kv_dtype)
    except (ValueError, OSError) as error:
        if disk is None:
            raise
        logger.warning("a copy of a DocumentCache does without its disk tier: %s", error)
        return DocumentCache(max_bytes, host_bytes, index=index, kv_dtype=kv_dtype)
