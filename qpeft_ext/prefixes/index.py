"""`PrefixIndex`: keys and values of a corpus on disk, made by ``qpeft index`` (`index_writer`) and read here.

It is a folder of shards (`files`) and ``manifest.json``, which says which LM and which prompt they belong to. A shard
names its prefixes by the SHA-256 of their ids. The place of each is kept in memory, 56 bytes a document.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
from numpy.lib.recfunctions import repack_fields

from ..prompts.prompt import Prompt
from ..utils.small_files import read_json
from ..utils.text import shorten
from .files import Extent, prefetch, read_contents
from .kv import PrefixKey
from .tiers import FileTier

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = "qpeft_ext index 1"
# S32 compares as bytes do, but drops zeros at its end; `_find` puts them back
_ROW = np.dtype([("digest", "S32"), ("shard", "i4"), ("offset", "i8"), ("nbytes", "i8"), ("checksum", "u4")])
_PROBE = "The moon's 2 tides, rising & falling; naïve été (x_1 = 10%)."


class PrefixIndex(FileTier):
    """An index, open for reading: the lowest tier of a `DocumentCache`.

    Args:
        folder: made by ``qpeft index``; it must be complete.
    Attributes:
        manifest: its settings and counts.
    Raises: FileNotFoundError if there is none; ValueError if it is not complete or not readable.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        super().__init__("index", 0)
        self.folder = Path(folder)
        self._stamp = _stamp(self.folder)
        self.manifest = read_manifest(self.folder)
        if not self.manifest["complete"]:
            raise ValueError(f"{self.folder} is not complete: run the same qpeft index command again, it goes on")
        self._checked: object = None
        self._told: set[str] = set()
        self._paths = shard_paths(self.folder)
        self._formats = [""] * len(self._paths)  # of the shards that can be read
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
            self._formats[shard] = contents.format
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
        Raises: ValueError if the index belongs to another LM, or was not made for ``deterministic=True``.
        """
        if key.model is not self._checked:
            expect_same_lm(self.folder, self.manifest, key.model.fingerprint())
            self._checked = key.model
        if key.deterministic and not self.manifest["alone"]:
            raise ValueError(
                f"{self.folder} was computed in batches, which deterministic scores cannot use; make "
                f"another one with qpeft index --deterministic"
            )
        row = self._find(key.digest)
        if row is None:
            return None
        shard, offset, nbytes, checksum = row.item()
        return Extent(self._paths[shard], offset, nbytes, checksum, self._formats[shard])

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
        """Log once for each shard that something in it is damaged; the files stay as they are.

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

    def _find(self, digest: bytes) -> np.void | None:
        row = int(np.searchsorted(self._digests, np.array(digest, dtype="S32")))
        return self._rows[row] if row < len(self) and self._digests[row].ljust(32, b"\0") == digest else None

    def _tell(self, path: Path, reason: object) -> None:
        if path.name not in self._told:
            self._told.add(path.name)
            logger.warning("%s is damaged (%s); what cannot be read from it is computed again", path, reason)

    def __len__(self) -> int:
        return len(self._rows)


def shard_paths(folder: Path) -> list[Path]:
    """The shards of an index, in order."""
    return sorted(path for path in folder.glob("shard-*.safetensors") if path.stem[6:].isdecimal())


def _stamp(folder: Path) -> tuple[int, int] | None:
    """Return a value that changes when the manifest is written again; None if there is none."""
    try:
        status = (folder / MANIFEST).stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino


def read_manifest(folder: Path) -> dict:
    """Read the manifest of an index.

    Raises: FileNotFoundError or ValueError if ``folder`` is no index.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no index: it has no {MANIFEST}; make one with qpeft index")
    try:
        manifest = read_json(path)
        if manifest["format"] != FORMAT:
            raise ValueError(f"expected the format {FORMAT!r}, got {shorten(manifest['format'])}")
        for name, kind in (("complete", bool), ("alone", bool), ("model", dict), ("prompt", dict)):
            if not isinstance(manifest[name], kind):
                raise ValueError(f"{name} must be a {kind.__name__}")
    except (ValueError, KeyError, TypeError) as error:
        why = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: not a readable manifest ({why}); make the index again") from None
    return manifest


def prompt_settings(prompt: Prompt) -> dict:
    """Everything that decides about the prefix ids of a text: template, tokenizer, limit."""
    empty, probe = prompt.documents(["", _PROBE])
    return {
        "template": list(empty.ids),
        "tokenizer": list(probe.document_ids),
        "max_document_tokens": prompt.max_document_tokens,
        "allow_special_tokens": prompt.allow_special_tokens,
    }


_LM_DIFFERENCES = {
    "model_type": "an LM of type {0}, this one is of type {1}",
    "dtype": "the LM in {0}, this one is in {1}; say --dtype {0}",
    "attention": "the attention implementation {0}, this LM uses {1}",
    "config": "another configuration of the LM (config.json)",
    "weights": "an LM with other weights than this one",
    "adapter": "another adapter in the LM (LoRA), or with none where this LM has one, or the reverse",
    "soft_prompt": "another soft prompt, or with none where this adapter has one, or the reverse",
}
_PROMPT_DIFFERENCES = {
    "max_document_tokens": "max_document_tokens {0}, here it is {1}",
    "tokenizer": "another tokenizer",
    "template": "another template (template, special_tokens, instruction, num_virtual_tokens)",
    "allow_special_tokens": "allow_special_tokens={0}, here it is {1}",
}


def expect_same_lm(folder: Path, manifest: dict, fingerprint: dict[str, str]) -> None:
    """Check that a fingerprint (`fingerprint_of`) is that of the index's LM.

    Raises: ValueError naming what differs.
    """
    _expect_equal(folder, manifest["model"], fingerprint, _LM_DIFFERENCES)


def expect_same_prompt(folder: Path, manifest: dict, settings: dict) -> None:
    """Check that settings (`prompt_settings`) are those of the index's prompt.

    Raises: ValueError naming what differs.
    """
    # the words of special tokens were special tokens before there was a choice
    _expect_equal(folder, {"allow_special_tokens": True} | manifest["prompt"], settings, _PROMPT_DIFFERENCES)


def expect_same_passages(folder: Path, manifest: dict, settings: dict[str, int] | None) -> None:
    """Check that documents are split as they were for the index, by the settings of a `Splitter` or None.

    Raises: ValueError that says how they were and are.
    """
    if manifest.get("passages") != settings:
        then, now = (
            f"passages ({', '.join(f'{name} {shorten(value)}' for name, value in parts.items())})"
            if isinstance(parts, dict)
            else "whole documents"
            for parts in (manifest.get("passages"), settings)
        )
        raise ValueError(
            f"the index {folder} was made of {then}, here {now} are read; use what it was made with, or make another "
            "one with qpeft index"
        )


def _expect_equal(folder: Path, expected: dict, got: dict, words: dict[str, str]) -> None:
    for name, difference in words.items():
        then, now = expected.get(name), got.get(name)
        if then != now:
            values = (str(value)[:80] for value in (then, now))
            raise ValueError(
                f"the index {folder} was made with {difference.format(*values)}; use "
                "what it was made with, or make another one with qpeft index"
            )
