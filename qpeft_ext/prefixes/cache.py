"""`DocumentCache`: the key/value caches of document prefixes, kept between calls in tiers, each under a byte budget."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ..lm.state import LMState, LMVersion
from .copies import Copies, copies
from .files import Place, prefetch, read_prefix
from .index import PrefixIndex
from .kv import Layout, PrefixKey, PrefixKV, prefix_digest
from .tiers import DiskTier, HostTier, MemoryTier, Tier

logger = logging.getLogger(__name__)


class DocumentCache:
    """Least-recently-used store of prefix caches, shared between queries, epochs and negatives.

    Tiers, from the top: ``device`` (memory of the model's device), ``host`` (pinned memory for a CUDA model), ``disk``
    (safetensors files, found again by the next process), ``index`` (made by ``qpeft index``, only read). What has no
    room in a tier moves to the one below it, what is found below moves up; a file stays where it is. Without further
    arguments there is the device tier alone.

    The key is the exact LM (its parameters, adapters in it, dtype) and a SHA-256 of the prefix *ids*: a document whose
    text, template or truncation changed cannot hit, whatever its ``doc_id``. Files know the LM by its content, which
    is read once a process for that (about 0.55 s per GB). Beside the budgets, what is read from files for one pass is
    held in memory that is used again. By itself not for use by several threads at once; rerankers take turns.

    A copy, pickled or deep, has the same settings and starts with nothing in memory. Only one cache at a time can use a
    folder as its disk tier: a copy that finds it in use does without one and says so.

    Args:
        max_bytes: budget for keys and values on the model's device. 0 stores nothing there.
        host_bytes: budget in the host's memory; 0: no such tier.
        disk, disk_bytes: a folder for files, and their budget.
        index: a `PrefixIndex`, or the folder of one.

    Attributes:
        tiers: `Tier` by name, with hits, misses, evictions, nbytes and max_bytes of each.
        hits, misses: prefixes found in any tier, and in none.  nbytes, evictions: of the device tier.
    """

    def __init__(
        self,
        max_bytes: int = 1 << 30,
        host_bytes: int = 0,
        disk: str | os.PathLike | None = None,
        disk_bytes: int = 0,
        index: PrefixIndex | str | os.PathLike | None = None,
    ) -> None:
        for name, value in (("max_bytes", max_bytes), ("host_bytes", host_bytes), ("disk_bytes", disk_bytes)):
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"DocumentCache: {name} must be a whole number ≥ 0, got {value!r}")
        if (disk is None) != (disk_bytes == 0):
            raise ValueError(f"DocumentCache: disk and disk_bytes belong together, got {disk!r} and {disk_bytes}")
        self._device = MemoryTier("device", max_bytes)
        self._host = HostTier(host_bytes) if host_bytes else None
        self._disk = None if disk is None else DiskTier(disk, disk_bytes)
        self.index = index if index is None or isinstance(index, PrefixIndex) else PrefixIndex(index)
        self._memory = [tier for tier in (self._device, self._host) if tier is not None]
        self._stores = [*self._memory, *([self._disk] if self._disk is not None else ())]
        self._files = [tier for tier in (self._disk, self.index) if tier is not None]
        self.misses = 0

    def __reduce__(self) -> tuple:
        # keys and values are known by an LM of this process, and an open folder cannot be sent
        disk = (None, 0) if self._disk is None else (self._disk.folder, self._disk.max_bytes)
        return _copied, (self._device.max_bytes, 0 if self._host is None else self._host.max_bytes, *disk, self.index)

    # -- look-ups and stores --------------------------------------------------------------------------------------

    @staticmethod
    def key(model: LMVersion, prefix_ids: Sequence[int], alone: bool = False) -> PrefixKey:
        return PrefixKey(model, prefix_digest(prefix_ids), len(prefix_ids), alone)

    def fetch(self, keys: Sequence[PrefixKey], layout: Layout, device: torch.device) -> list[PrefixKV | None]:
        """The prefixes that are stored, on the device; None for those that are not."""
        link = copies(device)
        found = [self._in_memory(key, link) for key in keys]
        self._read(keys, found, layout, link)
        self.misses += sum(prefix is None for prefix in found)
        return found

    def announce(self, keys: Sequence[PrefixKey]) -> bool:
        """Have the system read what `fetch` will want from files, without waiting. Returns: whether it wants any."""
        missing = [key for key in keys if not any(key in memory for memory in self._memory)]
        return any([tier.prefetch(key) for tier in self._files for key in missing])

    def put(self, key: PrefixKey, prefix: PrefixKV) -> None:
        """Store one unpadded prefix; the least recently used ones move down, and out of the lowest tier."""
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
            return  # nowhere to go; of an LM that has changed; or spread over several devices
        for leaving in self._stores[level].put(key, prefix):
            self._store(*leaving, level + 1)

    def _read(self, keys, found: list[PrefixKV | None], layout: Layout, link: Copies) -> None:
        """Fill the gaps in ``found`` from files."""
        places: dict[int, tuple[DiskTier | PrefixIndex, Place]] = {}
        for tier in self._files:
            for i in (i for i, prefix in enumerate(found) if prefix is None and i not in places):
                place = tier.locate(keys[i])
                if place is not None and place.nbytes != layout.nbytes(keys[i].length):
                    tier.drop(keys[i], f"expected {layout.nbytes(keys[i].length)} bytes, got {place.nbytes}")
                    place = None
                if place is None:
                    tier.count(False)
                else:
                    places[i] = tier, place
                    prefetch(place.path, place.offset, place.nbytes)
        # a GPU's copies start from pinned memory; on the CPU passes read the prefixes where they lie
        staging = link.staging(sum(place.nbytes for _, place in places.values()) if link.cuda else 0)
        for i, (tier, place) in places.items():
            if link.cuda:
                buffer, staging = staging[: place.nbytes], staging[place.nbytes :]
            else:
                buffer = torch.empty(place.nbytes, dtype=torch.uint8)
            try:
                read_prefix(place, buffer)
            except (ValueError, OSError) as error:
                tier.drop(keys[i], error)
            else:
                found[i] = link.to_device(layout.unpack(buffer.view(layout.dtype), keys[i].length))
                if any(place.nbytes <= memory.max_bytes for memory in self._memory):
                    self._store(keys[i], found[i], 0)
            tier.count(found[i] is not None)
        if places:
            link.staging_is_read()

    # -- what there is --------------------------------------------------------------------------------------------

    @property
    def tiers(self) -> dict[str, Tier]:
        return {tier.name: tier for tier in (*self._stores, *([self.index] if self.index is not None else ()))}

    @property
    def stores(self) -> bool:
        """Whether `put` has a place to put something."""
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
        return f"DocumentCache({'; '.join(map(str, self.tiers.values()))}; {rate} in all)"


def _copied(max_bytes: int, host_bytes: int, disk: Path | None, disk_bytes: int, index) -> DocumentCache:
    """A cache with these settings, without the disk tier if its folder is in use."""
    try:
        return DocumentCache(max_bytes, host_bytes, disk, disk_bytes, index)
    except (ValueError, OSError) as error:
        if disk is None:
            raise
        logger.warning("a copy of a DocumentCache does without its disk tier: %s", error)
        return DocumentCache(max_bytes, host_bytes, index=index)
