"""The identity of a cached prefix."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..lm.state import LMVersion


class PrefixKey(NamedTuple):
    """The identity of a cached prefix.

    Attributes:
        model: the version of the LM.
        digest: SHA-256 of the prefix ids.
        length: how many ids there are.
        deterministic: whether it was computed unpadded in a pass of its own, which changes the last bits.
        kv_dtype: the dtype that it is stored in, where that is not the LM's own.
    """

    model: LMVersion
    digest: bytes
    length: int
    deterministic: bool
    kv_dtype: str | None = None


def prefix_digest(prefix_ids: Sequence[int]) -> bytes:
    """SHA-256 of the ids of a prefix."""
    return hashlib.sha256(np.asarray(prefix_ids, dtype=np.int64).tobytes()).digest()
