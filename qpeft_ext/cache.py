"""`DocumentCache`: the key/value caches of document prefixes, kept between calls under a byte budget."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from .prefix_cache import PrefixKV


class DocumentCache:
    """Least-recently-used store of prefix caches, shared between queries, epochs and negatives.

    The key is the state of the LM and a SHA-256 of the prefix *ids*: a document whose text, template or truncation
    changed cannot hit, whatever its ``doc_id``.

    Args:
        max_bytes: budget for keys and values on the model's device. 0 stores nothing.

    Attributes: hits, misses, evictions: counts since the start.  nbytes: bytes stored now.
    """

    def __init__(self, max_bytes: int = 1 << 30) -> None:
        if not isinstance(max_bytes, int) or max_bytes < 0:
            raise ValueError(f"DocumentCache: max_bytes must be a whole number ≥ 0, got {max_bytes!r}")
        self.max_bytes = max_bytes
        self.nbytes = 0
        self.hits = self.misses = self.evictions = 0
        self._entries: OrderedDict[tuple, PrefixKV] = OrderedDict()

    @staticmethod
    def key(model_state: object, prefix_ids: Sequence[int]) -> tuple:
        return model_state, hashlib.sha256(np.asarray(prefix_ids, dtype=np.int64).tobytes()).digest()

    def get(self, key: tuple) -> PrefixKV | None:
        entry = self._entries.get(key)
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return entry

    def put(self, key: tuple, prefix: PrefixKV) -> None:
        """Store one unpadded prefix; the least recently used ones leave. One larger than the budget is not stored."""
        if prefix.nbytes > self.max_bytes or key in self._entries:
            return
        self._entries[key] = prefix
        self.nbytes += prefix.nbytes
        while self.nbytes > self.max_bytes:
            _, evicted = self._entries.popitem(last=False)
            self.nbytes -= evicted.nbytes
            self.evictions += 1

    def clear(self) -> None:
        self._entries.clear()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        asked = self.hits + self.misses
        rate = f"{self.hits / asked:.0%} hits" if asked else "unused"
        size = f"{self.nbytes / 2**20:.1f} of {self.max_bytes / 2**20:.1f} MiB"
        return f"DocumentCache({len(self)} prefixes, {size}, {rate})"
