"""`PrefixIndex`: keys and values of a corpus on disk, made by ``qpeft index`` (`index_writer`) and read here.

It is a folder of shards (`files`) and ``manifest.json``, which says which LM and which prompt they belong to. A shard
names its prefixes by the SHA-256 of their ids. The place of each is kept in memory, 56 bytes a document.
"""

from __future__ import annotations

import fnmatch
import logging
import os
from pathlib import Path

import numpy as np
import torch
from numpy.lib.recfunctions import repack_fields

from ..prompts.prompt import Prompt
from ..utils.files import why_unreadable
from .files import Extent, prefetch, read_contents
from .keys import PrefixKey
from .manifest import (
    MANIFEST,
    expect_same_lm,
    expect_same_passages,
    expect_same_prompt,
    other_kv_dtype,
    prompt_settings,
    read_manifest,
)
from .origin import expect_origin
from .tiers import FileTier

logger = logging.getLogger(__name__)

# S32 compares as bytes do, but drops zeros at its end; `_find` puts them back
_ROW = np.dtype([("digest", "S32"), ("shard", "i4"), ("offset", "i8"), ("nbytes", "i8"), ("checksum", "u4")])


class PrefixIndex(FileTier):
    """An index, open for reading: the lowest tier of a `DocumentCache`.

    Args:
        folder: made by ``qpeft index``; it must be complete.
    Attributes:
        manifest: its settings and counts.
        kv_dtype: the dtype of its keys and values; None: that of its LM.
    Raises: FileNotFoundError if there is none; ValueError if it is not complete or not readable.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        super().__init__("index", 0)
        self.folder = Path(folder)
        self._stamp = _stamp(self.folder)
        self.manifest = read_manifest(self.folder)
        if not self.manifest["complete"]:
            raise ValueError(f"{self.folder} is not complete: run the same qpeft index command again, it goes on")
        self.kv_dtype: str | None = self.manifest.get("kv_dtype")
        self._checked: object = None
        self._told: set[str] = set()
        self._paths = shard_paths(self.folder)
        self._read_as: dict[int, tuple[str, torch.dtype | None]] = {}  # shards that can be read: format, dtype
        rows = np.concatenate([np.zeros(0, _ROW), *map(self._read_shard, range(len(self._paths)))])
        order = np.argsort(rows["digest"])
        self._digests = rows["digest"][order]  # an array of its own, or each search would copy them together first
        self._rows = repack_fields(rows[["shard", "offset", "nbytes", "checksum"]])[order]
        self.nbytes = int(self._rows["nbytes"].sum())

    def __reduce__(self) -> tuple:
        return PrefixIndex, (self.folder,)  # the receiver reads the folder again

    def _read_shard(self, shard: int) -> np.ndarray:
        """Names and places of the prefixes in a shard."""
        try:
            contents = read_contents(self._paths[shard])
            expect_origin(contents.metadata, self.manifest["model"], self.manifest["alone"])
            self._read_as[shard] = contents.format, contents.dtype
            return np.array(
                [
                    (bytes.fromhex(name), shard, extent.offset, extent.nbytes, extent.checksum)
                    for name, extent in contents.extents.items()
                ],
                dtype=_ROW,
            )
        except (ValueError, OSError) as error:
            self._tell(self._paths[shard], error)
            return np.zeros(0, _ROW)

    def locate(self, key: PrefixKey) -> Extent | None:
        """Find the prefix.

        Args:
            key: its identity.
        Returns: None if the index does not have it.
        Raises: ValueError if the index belongs to another LM, has another dtype, or was not made for
            ``deterministic=True``.
        """
        if key.model is not self._checked:
            expect_same_lm(self.folder, self.manifest, key.model.fingerprint())
            self._checked = key.model
        if key.kv_dtype != self.kv_dtype:
            raise other_kv_dtype(self.folder, self.kv_dtype, key.kv_dtype)
        if key.deterministic and not self.manifest["alone"]:
            raise ValueError(
                f"{self.folder} was computed in batches, which deterministic scores cannot use; make "
                f"another one with qpeft index --deterministic"
            )
        row = self._find(key.digest)
        if row is None:
            return None
        shard, offset, nbytes, checksum = row.item()
        return Extent(self._paths[shard], offset, nbytes, checksum, *self._read_as[shard])

    def prefetch(self, key: PrefixKey) -> bool:
        """Ask the system to read the prefix ahead.

        Args:
            key: its identity.
        Returns: whether the index has it.
        Raises: as `locate`.
        """
        extent = self.locate(key)
        if extent is not None:
            prefetch(extent.path, extent.offset, extent.nbytes)
        return extent is not None

    def drop(self, key: PrefixKey, reason: object) -> None:
        """Log once for each shard that something in it is damaged or cannot be read; the files stay as they are.

        Args:
            key: a prefix that the index has.
            reason: what is wrong with it.
        """
        row = self._find(key.digest)
        if row is not None:
            self._tell(self._paths[row["shard"]], reason)

    def is_outdated(self) -> bool:
        """Tell whether the folder has another complete manifest than the one that was read."""
        stamp = _stamp(self.folder)
        if stamp is None or stamp == self._stamp:
            return False
        try:
            return bool(read_manifest(self.folder)["complete"])
        except (ValueError, OSError):
            return False

    def expect_prompt(self, prompt: Prompt, passages: dict[str, int] | None = None) -> None:
        """Check that a prompt makes the prefixes of this index, and of the same parts of documents.

        Args:
            prompt: the model's.
            passages: settings of the `Splitter` that makes passages of documents; None: they are read as a whole.
        Raises: ValueError naming what differs if it makes other prefixes of the same text.
        """
        expect_same_prompt(self.folder, self.manifest, prompt_settings(prompt))
        expect_same_passages(self.folder, self.manifest, passages)

    def kv_dtype_with(self, kv_dtype: str | None) -> str | None:
        """The dtype in which a cache on top of this index stores keys and values.

        Args:
            kv_dtype: what the cache is asked for; None: nothing.
        Raises: ValueError if the two differ. One that may be the LM's own is compared in `locate`.
        """
        if kv_dtype is not None and self.kv_dtype not in (None, kv_dtype):
            raise other_kv_dtype(self.folder, self.kv_dtype, kv_dtype)
        return kv_dtype or self.kv_dtype

    def _find(self, digest: bytes) -> np.void | None:
        row = int(np.searchsorted(self._digests, np.array(digest, dtype="S32")))
        return self._rows[row] if row < len(self) and self._digests[row].ljust(32, b"\0") == digest else None

    def _tell(self, path: Path, reason: object) -> None:
        if path.name not in self._told:
            self._told.add(path.name)
            if unreadable := why_unreadable(reason):
                logger.warning("%s cannot be read (%s): its documents are computed again, each time", path, unreadable)
                return
            logger.warning(
                "%s is damaged (%s); what cannot be read from it is computed again, each time: remove it and run the "
                "qpeft index command again", path, reason
            )  # fmt: skip

    def __len__(self) -> int:
        return len(self._rows)


def shard_paths(folder: Path) -> list[Path]:
    """The shards of an index, in order. Raises: OSError if its folder cannot be read, which glob takes for empty."""
    names = fnmatch.filter(os.listdir(folder), "shard-*.safetensors")
    return sorted(folder / name for name in names if Path(name).stem[6:].isdecimal())


def _stamp(folder: Path) -> tuple[int, int] | None:
    """Return a value that changes when the manifest is written again; None if there is none."""
    try:
        status = (folder / MANIFEST).stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino
