"""Make an index: the prefix caches of a corpus, computed once and written in shards; a run that was killed goes on."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from .cache import prefix_digest
from .cache_tiers import copies, lock_folder
from .prefix_cache import PrefixKV
from .prefix_files import header_bytes, read_contents, write_prefixes
from .prefix_index import (
    FORMAT,
    MANIFEST,
    expect_same_lm,
    expect_same_prompt,
    prompt_settings,
    read_manifest,
    shard_paths,
)
from .prompt import DocumentPrefix
from .utils.files import drop_temporary, folder_permissions, permissions_of, write_text

logger = logging.getLogger(__name__)

SHARD_BYTES = 256 << 20
_CHUNK = 1024  # documents that are tokenised and sorted by length together
_MAX_PREFIXES = 1 << 16  # in a shard, so that its header stays small


@dataclass
class Plan:
    """What is to be done.

    documents: in the corpus.  distinct: different prefixes.  there: of those, in the index already.
    nbytes: bytes that the others take.  cut: documents cut to max_document_tokens.
    """

    documents: int
    distinct: int
    there: int
    nbytes: int
    cut: int

    @property
    def missing(self) -> int:
        return self.distinct - self.there


class IndexWriter:
    """Writes an index of a corpus, or goes on with one; one process at a time.

    A document whose text is already there costs nothing, so a corpus that grew or changed is brought up to date by
    the same call. Prefixes are computed in batches (equal to 1e-5 in float32 to computing each alone), or one by one
    with ``alone``, which `QPeftModel.forward` needs for ``deterministic=True``.

    Args:
        model: a `QPeftModel`; its LM, prompt and soft prompt are used, not its clues.
        corpus: documents by id.
        folder: of the index.
        alone: compute each prefix alone and unpadded.
        max_tokens_per_batch: token budget of a pass; halved when the device runs out of memory.
        shard_bytes: of a shard; so much work is lost by a kill, and so much memory is held.
    Raises: ValueError if the folder holds an index of another LM or prompt, or the LM's cache cannot be shared.
    """

    def __init__(self, model, corpus: Mapping[str, dict], folder: str | os.PathLike, *, alone: bool = False,
                 max_tokens_per_batch: int = 8192, shard_bytes: int = SHARD_BYTES) -> None:
        if model.engine.why_plain:
            raise ValueError(f"an index is of no use to this model: {model.engine.why_plain}")
        self.model, self.corpus, self.folder, self.alone = model, corpus, Path(folder), alone
        self.max_tokens_per_batch, self.shard_bytes = max_tokens_per_batch, shard_bytes
        self._link = copies(model.engine.device)
        self._mode = permissions_of(getattr(corpus, "path", None))  # what is made of a private corpus is as private
        self.folder.mkdir(folder_permissions(self._mode), parents=True, exist_ok=True)
        self._lock = lock_folder(self.folder)
        self._settings = self._check_settings()
        drop_temporary(self.folder)
        self._shards = 0
        self._keys = np.zeros(0, dtype=np.int64)
        self._done = np.zeros(0, dtype=bool)

    def close(self) -> None:
        """Let other processes use the folder."""
        self._lock.close()

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # -- before ---------------------------------------------------------------------------------------------------

    def plan(self, show_progress_bar: bool | None = None) -> Plan:
        """Tokenise the corpus and look at what is there: how much is to be done, exactly."""
        layout = self.model.engine.layout
        keys, lengths, cut = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
        for chunk in self._chunks("reading", show_progress_bar):
            keys.append(_keys(chunk))
            lengths.append(np.array([len(prefix.ids) for prefix in chunk]))
            cut += sum(prefix.cut > 0 for prefix in chunk)
        keys, first = np.unique(np.concatenate(keys), return_index=True)
        lengths = np.concatenate(lengths)[first]
        self._keys, self._done = keys, np.isin(keys, self._keys_there())
        sizes = {int(length): layout.nbytes(int(length)) for length in np.unique(lengths)}
        missing = lengths[~self._done]
        nbytes = sum(sizes[int(length)] for length in missing) + header_bytes(len(missing))
        return Plan(len(self.corpus), len(keys), int(self._done.sum()), nbytes if len(missing) else 0, cut)

    def expect_room(self, plan: Plan) -> None:
        """Raises: ValueError with the figures if the index will not fit on the disk."""
        free = shutil.disk_usage(self.folder).free
        if plan.nbytes > free:
            raise ValueError(f"the index needs {size(plan.nbytes)} more, but {self.folder} has {size(free)} free; free "
                             f"some space, name another disk, or lower max_document_tokens")

    # -- the work -------------------------------------------------------------------------------------------------

    def run(self, plan: Plan, show_progress_bar: bool | None = None) -> None:
        """Compute what is missing. An interrupt (Ctrl-C) writes what is computed before it goes on."""
        if plan.missing:
            self._write_manifest(plan, complete=False)
        hidden = None if show_progress_bar is None else not show_progress_bar
        pending: list[tuple[str, PrefixKV]] = []
        held = 0
        with tqdm(total=plan.missing, desc="index", unit=" documents", disable=hidden) as progress:
            try:
                for chunk in self._chunks() if plan.missing else ():
                    for group in self._groups(chunk):
                        for prefix, stored in self._compute(group):
                            pending.append((prefix_digest(prefix.ids).hex(), stored))
                            held += stored.nbytes
                            progress.update()
                            if held >= self.shard_bytes or len(pending) == _MAX_PREFIXES:
                                pending, full, held = [], pending, 0
                                self._write_shard(full)
            finally:  # also when something went wrong: what is computed is right
                self._write_shard(pending)
        self._write_manifest(plan, complete=True)

    def _groups(self, chunk: list[DocumentPrefix]) -> Iterator[list[DocumentPrefix]]:
        """Prefixes of a chunk that are missing, in groups of similar length within the token budget."""
        group: list[DocumentPrefix] = []
        for prefix in sorted(self._missing(chunk), key=lambda prefix: len(prefix.ids)):
            if group and (self.alone or (len(group) + 1) * len(prefix.ids) > self.max_tokens_per_batch):
                yield group
                group = []
            group.append(prefix)
        if group:
            yield group

    def _missing(self, chunk: list[DocumentPrefix]) -> Iterator[DocumentPrefix]:
        for prefix, row in zip(chunk, np.searchsorted(self._keys, _keys(chunk)), strict=True):
            if row < len(self._keys) and not self._done[row]:
                self._done[row] = True  # the next document with the same text is not missing
                yield prefix

    @torch.no_grad()
    def _compute(self, group: list[DocumentPrefix]) -> Iterator[tuple[DocumentPrefix, PrefixKV]]:
        try:
            stored = [self._link.to_host(prefix) for prefix in
                      self.model.engine.prefill([prefix.ids for prefix in group]).split()]
        except torch.OutOfMemoryError:
            if len(group) == 1:
                raise
            self.max_tokens_per_batch = max(1, self.max_tokens_per_batch // 2)
            logger.warning("out of memory: going on with max_tokens_per_batch=%d", self.max_tokens_per_batch)
            for half in (group[: len(group) // 2], group[len(group) // 2 :]):
                yield from self._compute(half)
        else:
            yield from zip(group, stored, strict=True)

    def _write_shard(self, pending: list[tuple[str, PrefixKV]]) -> None:
        if not pending:
            return
        for _, prefix in pending:
            if prefix.ready is not None:
                prefix.ready.synchronize()
        path = self.folder / f"shard-{self._shards:06d}.safetensors"
        try:
            write_prefixes(path, [(name, prefix.flat) for name, prefix in pending],
                           {"fingerprint": json.dumps(self._settings["model"]), "alone": str(self.alone)}, self._mode)
        except OSError as error:
            raise OSError(f"cannot write {path}: {error.strerror or error}; make room and run the same command again, "
                          f"it goes on") from None
        self._shards += 1

    def _chunks(self, title: str = "", show_progress_bar: bool | None = False) -> Iterator[list[DocumentPrefix]]:
        """The corpus in its order, tokenised; only a chunk is held."""
        hidden = None if show_progress_bar is None else not show_progress_bar
        texts: list[dict] = []
        with tqdm(total=len(self.corpus), desc=title, unit=" documents", delay=1, disable=hidden) as progress:
            for place, doc_id in enumerate(self.corpus, 1):
                texts.append(self.corpus[doc_id])
                if len(texts) == _CHUNK or place == len(self.corpus):
                    yield self.model.prompt.documents(texts)
                    progress.update(len(texts))
                    texts = []

    # -- the folder -----------------------------------------------------------------------------------------------

    def _check_settings(self) -> dict:
        """This run's settings; those of an index that is there already must be the same."""
        engine = self.model.engine
        settings = {"format": FORMAT, "model": engine.version().fingerprint(),
                    "prompt": prompt_settings(self.model.prompt), "alone": self.alone}
        if not (self.folder / MANIFEST).exists():
            if others := [file.name for file in self.folder.iterdir() if not file.name.startswith(".")]:
                raise ValueError(f"{self.folder} is no index and holds {others[0]}; name an empty or a new folder")
            return settings
        there = read_manifest(self.folder)
        expect_same_lm(self.folder, there, settings["model"])
        expect_same_prompt(self.folder, there, settings["prompt"])
        if there["alone"] != self.alone:
            raise ValueError(f"the index {self.folder} was made {'with' if there['alone'] else 'without'} "
                             f"--deterministic; do so again, or name another folder")
        return settings

    def _keys_there(self) -> np.ndarray:
        """Keys of what the shards hold; a damaged shard is removed, so that its prefixes are computed again."""
        keys: list[int] = []
        for path in shard_paths(self.folder):
            self._shards = max(self._shards, 1 + int(re.sub(r"\D", "", path.stem)))
            try:
                keys += [_key(bytes.fromhex(name)) for name in read_contents(path).places]
            except ValueError as error:
                logger.warning("%s is damaged (%s): it is removed, its documents are computed again", path, error)
                path.unlink()
        return np.array(keys, dtype=np.int64)

    def _write_manifest(self, plan: Plan, complete: bool) -> None:
        from . import __version__

        shards = shard_paths(self.folder)
        manifest = self._settings | {
            "complete": complete, "documents": plan.documents, "prefixes": plan.distinct, "shards": len(shards),
            "bytes": sum(path.stat().st_size for path in shards), "qpeft_version": __version__,
        }
        write_text(self.folder / MANIFEST, json.dumps(manifest, indent=1) + "\n", self._mode, follow=False)


def _key(digest: bytes) -> int:
    """8 bytes of a digest: enough to tell the documents of a corpus apart; a clash only costs a computation later."""
    return int.from_bytes(digest[:8], "big", signed=True)


def _keys(chunk: list[DocumentPrefix]) -> np.ndarray:
    return np.array([_key(prefix_digest(prefix.ids)) for prefix in chunk], dtype=np.int64)


def size(nbytes: int) -> str:
    """Bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if nbytes < 1000 or unit == "TB":
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    raise AssertionError
