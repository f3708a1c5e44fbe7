"""The tiers of `DocumentCache`, each with a budget in bytes: the model's device, the host's memory, files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch

from ..utils.files import drop_temporary, why_unreadable
from ..utils.locks import lock_folder
from ..utils.words import counted
from .copies import copies
from .files import Extent, prefetch, read_contents, write_prefixes
from .keys import PrefixKey
from .kv import PrefixKV
from .origin import expect_origin, origin_of

logger = logging.getLogger(__name__)

_OWN_FILE = re.compile(r"[0-9a-f]{64}\.safetensors")  # as `_file_name` makes them: others are not ours to delete


@dataclass
class Tier:
    """One tier of a `DocumentCache`, and its counts.

    Attributes:
        name: "device", "host", "disk" or "index".
        max_bytes: its budget.
        nbytes: bytes of the prefixes in it now.
        hits, misses: look-ups that found a prefix here, and that did not.
        evictions: prefixes that had to leave for others.
    """

    name: str
    max_bytes: int
    nbytes: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0

    def __len__(self) -> int:
        """Prefixes in the tier."""
        raise NotImplementedError

    def count(self, found: bool) -> None:
        """Count a look-up.

        Args:
            found: whether it found a prefix here.
        """
        self.hits += found
        self.misses += not found

    def __str__(self) -> str:
        asked = self.hits + self.misses
        budget = f" of {self.max_bytes / 2**20:.1f}" if self.max_bytes else ""
        return (
            f"{self.name}: {counted(len(self), 'prefixes', 'prefix')}, {self.nbytes / 2**20:.1f}{budget} MiB, "
            f"{f'{self.hits / asked:.0%} hits' if asked else 'unused'}"
        )


class MemoryTier(Tier):
    """Prefixes in memory, least recently used first."""

    def __init__(self, name: str, max_bytes: int) -> None:
        super().__init__(name, max_bytes)
        self._entries: OrderedDict[PrefixKey, PrefixKV] = OrderedDict()

    def get(self, key: PrefixKey) -> PrefixKV | None:
        entry = self._entries.get(key)
        self.count(entry is not None)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def put(self, key: PrefixKey, prefix: PrefixKV) -> list[tuple[PrefixKey, PrefixKV]]:
        """Store a prefix. Returns: those that have no room, older ones or itself if larger than the budget."""
        cost, leaving = self.cost(prefix), []
        if cost > self.max_bytes:
            return [(key, prefix)]
        if key in self._entries:
            self.take(key)
        while self.nbytes + cost > self.max_bytes:
            oldest = next(iter(self._entries))
            leaving.append((oldest, self.take(oldest)))
            self.evictions += 1
        self._entries[key] = self.stored(prefix)
        self.nbytes += cost
        return leaving

    def take(self, key: PrefixKey) -> PrefixKV:
        """Remove and return a prefix that is there."""
        prefix = self._entries.pop(key)
        self.nbytes -= self.cost(prefix)
        return prefix

    def cost(self, prefix: PrefixKV) -> int:
        """Bytes that the prefix takes here."""
        return prefix.nbytes

    def stored(self, prefix: PrefixKV) -> PrefixKV:
        """The prefix as it is stored here."""
        return prefix

    def clear(self) -> None:
        self._entries.clear()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: PrefixKey) -> bool:
        return key in self._entries


class HostTier(MemoryTier):
    """Prefixes in the host's memory.

    For a CUDA model they are copies in pinned memory; for a model on the CPU it is the same memory, nothing is copied.

    Args:
        max_bytes: its budget.
    """

    def __init__(self, max_bytes: int) -> None:
        super().__init__("host", max_bytes)

    def stored(self, prefix: PrefixKV) -> PrefixKV:
        return copies(prefix.block.device).to_host(prefix)

    def cost(self, prefix: PrefixKV) -> int:
        """Bytes that the prefix takes here: torch rounds pinned memory up to a power of two."""
        block = prefix.block
        pinned = torch.cuda.is_available() and (block.is_cuda or block.is_pinned())
        return 1 << (prefix.nbytes - 1).bit_length() if pinned else prefix.nbytes


class FileTier(Tier):
    """A tier whose prefixes are in files."""

    def locate(self, key: PrefixKey) -> Extent | None:
        """Find the prefix. Returns: None if it is not here."""
        raise NotImplementedError

    def prefetch(self, key: PrefixKey) -> bool:
        """Ask the system to read the prefix ahead. Returns: whether it is here."""
        raise NotImplementedError

    def drop(self, key: PrefixKey, reason: object) -> None:
        """Take note that the prefix, which was located here, is damaged."""
        raise NotImplementedError


class DiskTier(FileTier):
    """Prefixes in a folder, one file each, named by a digest of the LM's content and the prefix ids.

    They outlive the process and are found by the next one with the same LM.

    Args:
        folder: made if need be; one tier at a time may use it. Files in it that have other names stay.
        max_bytes: budget for the files.
    Raises: ValueError if the folder is in use; OSError if it cannot be made.
    """

    def __init__(self, folder: str | os.PathLike, max_bytes: int) -> None:
        super().__init__("disk", max_bytes)
        self.folder = Path(folder)
        self.folder.mkdir(0o700, parents=True, exist_ok=True)  # prefixes tell what the documents say
        self._lock = lock_folder(self.folder)
        drop_temporary(self.folder)
        files = (file for file in self.folder.glob("*.safetensors") if _OWN_FILE.fullmatch(file.name))
        found = sorted((file.stat().st_mtime_ns, file) for file in files)
        self._sizes: OrderedDict[str, int] = OrderedDict((file.stem, file.stat().st_size) for _, file in found)
        self.nbytes = sum(self._sizes.values())
        self._stopped = False
        self._make_room(0)

    def locate(self, key: PrefixKey) -> Extent | None:
        """Find the prefix. Returns: None if it is not here or its file is damaged."""
        name = _file_name(key)
        if name not in self._sizes:
            return None
        path = self._path(name)
        try:
            contents = read_contents(path)
            expect_origin(contents.metadata, key.model.fingerprint(), key.deterministic)
            if list(contents.extents) != [key.digest.hex()]:
                raise ValueError("it is of another document")
            (extent,) = contents.extents.values()
        except (OSError, ValueError) as error:
            self.drop(key, error)
            return None
        with contextlib.suppress(OSError):  # a disk that has become read-only can still be read
            os.utime(path)  # the order of use outlives the process
        self._sizes.move_to_end(name)
        return extent

    def prefetch(self, key: PrefixKey) -> bool:
        """Ask the system to read the file of the prefix ahead. Returns: whether there is one."""
        name = _file_name(key)
        if name in self._sizes:
            prefetch(self._path(name))
        return name in self._sizes

    def put(self, key: PrefixKey, prefix: PrefixKV) -> list[tuple[PrefixKey, PrefixKV]]:
        """Write a prefix, unless it is there. Returns: an empty list, since nothing moves further down."""
        name = _file_name(key)
        if name in self._sizes or self._stopped or prefix.nbytes > self.max_bytes:
            return []
        if not self._make_room(prefix.nbytes + 1024):  # 1024: the header is shorter
            return []
        if prefix.ready is not None:
            prefix.ready.synchronize()
        content = [(key.digest.hex(), prefix.block.cpu())]
        metadata = origin_of(key.model.fingerprint(), key.deterministic, key.kv_dtype)
        try:
            size = write_prefixes(self._path(name), content, metadata, mode=0o600)
        except (OSError, ValueError) as error:
            self._stopped = True
            logger.warning(
                "the disk tier %s stores nothing more: %s; what is there is still used",
                self.folder,
                getattr(error, "strerror", None) or error,
            )
            return []
        self._sizes[name] = size
        self.nbytes += size
        return []

    def drop(self, key: PrefixKey, reason: object) -> None:
        """Forget a file, and remove it if it is damaged. One that only cannot be read stays."""
        name = _file_name(key)
        if unreadable := why_unreadable(reason):
            logger.warning("%s cannot be read (%s): its prefix is computed again", self._path(name), unreadable)
            self.nbytes -= self._sizes.pop(name)
            return
        logger.warning("%s is damaged (%s); its prefix is computed again", self._path(name), reason)
        self._remove(name)

    def clear(self) -> None:
        """Delete the files."""
        for name in list(self._sizes):
            self._remove(name)

    def _make_room(self, nbytes: int) -> bool:
        if nbytes > self.max_bytes:
            return False
        while self.nbytes + nbytes > self.max_bytes:
            self._remove(next(iter(self._sizes)))
            self.evictions += 1
        return True

    def _remove(self, name: str) -> None:
        with contextlib.suppress(OSError):  # a folder of this name, or gone already
            self._path(name).unlink()
        self.nbytes -= self._sizes.pop(name)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def __len__(self) -> int:
        return len(self._sizes)


def _file_name(key: PrefixKey) -> str:
    stored_as = [key.kv_dtype] if key.kv_dtype else []  # files of earlier versions have the LM's own dtype
    content = json.dumps([key.model.fingerprint(), key.deterministic, *stored_as], sort_keys=True)
    return hashlib.sha256(content.encode() + key.digest).hexdigest()
