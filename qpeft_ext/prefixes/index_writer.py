"""Make an index: keys and values of the documents of a corpus, computed once and written in shards.

A run that was killed is resumed and ends with the same bytes: which prefixes share a pass depends on what was there
when the run began, not on how far it came, and a shard that an interrupt left short is filled up.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ..prompts.passages import Splitter
from ..prompts.pieces import DocumentPrefix
from ..utils.files import drop_temporary, folder_permissions, permissions_of, write_text
from ..utils.inputs import true_or_false
from ..utils.locks import lock_folder
from ..utils.memory import in_halves
from ..utils.progress import progress_bar
from .copies import copies
from .dtypes import expect_kv_dtype
from .files import Contents, Extent, header_bytes, read_contents, read_prefix, write_prefixes
from .index import shard_paths
from .keys import prefix_digest
from .kv import PrefixKV
from .manifest import MANIFEST, expect_same_settings, read_manifest, settings_of
from .origin import OtherOrigin, expect_origin, origin_of
from .survey import Survey, size

logger = logging.getLogger(__name__)

SHARD_BYTES = 256 << 20
_CHUNK = 1024  # documents that are tokenised and sorted by length together
_MAX_PREFIXES = 1 << 16  # in a shard, so that its header stays small

_Pending = tuple[str, torch.Tensor, torch.cuda.Event | None]  # name, flat prefix, event after which it may be read


class IndexWriter:
    """Writes an index of a corpus, or completes one; one process at a time.

    A document whose text is in the index already costs nothing, so the same call brings a corpus that grew or changed
    up to date. Prefixes are computed in batches, or one per pass with ``deterministic``; the two differ by 1e-5 in
    float32.

    Args:
        model: a `QPeftModel`; its LM, prompt and soft prompt are used, not its clues.
        corpus: documents by id.
        folder: of the index.
        deterministic: compute each prefix unpadded in a pass of its own, as rerankers with ``deterministic=True`` need.
        max_tokens_per_batch: token budget of a pass; halved when the device runs out of memory.
        splitter: splits long documents into passages, each of which has a prefix; None: they are cut.
        shard_bytes: size of a shard: how much work a kill loses at most, and how much memory is used.
        kv_dtype: the dtype in which keys and values are stored, as for `DocumentCache`; None: the LM's own.
    Raises: ValueError if the folder holds an index of another LM, prompt or dtype, or the LM's cache cannot be shared.
    """

    def __init__(
        self,
        model,
        corpus: Mapping[str, dict],
        folder: str | os.PathLike,
        *,
        deterministic: bool = False,
        max_tokens_per_batch: int = 8192,
        splitter: Splitter | None = None,
        shard_bytes: int = SHARD_BYTES,
        kv_dtype: str | None = None,
    ) -> None:
        expect_kv_dtype(kv_dtype, "IndexWriter: kv_dtype")
        if reason := model.why_no_index:
            raise ValueError(f"an index is of no use to this model: {reason}")
        self.model, self.corpus, self.folder = model, corpus, Path(folder)
        self.deterministic = true_or_false(deterministic, "IndexWriter: deterministic")
        self.max_tokens_per_batch, self.splitter, self.shard_bytes = max_tokens_per_batch, splitter, shard_bytes
        self._packing = model.engine.packing.stored_as(kv_dtype)
        self._kv_dtype: str | None = model.engine.packing.other_dtype(kv_dtype)
        self._link = copies(model.engine.device)
        self._mode = permissions_of(getattr(corpus, "path", None))  # what is made of a private corpus is as private
        self.folder.mkdir(folder_permissions(self._mode), parents=True, exist_ok=True)
        self._lock = lock_folder(self.folder)
        self._first_shard: int | None = None  # of this run, which an earlier process may have begun
        try:
            self._settings = self._check_settings()
        except BaseException:  # a caller that keeps the error, as notebooks do, must not keep the folder locked
            self.close()
            raise
        drop_temporary(self.folder)
        self._shards = 0
        self._keys = np.zeros(0, dtype=np.int64)
        self._done = np.zeros(0, dtype=bool)  # by key: there when the run began, or yielded by `_missing`
        self._written = np.zeros(0, dtype=bool)  # by key: by this run, in earlier processes
        self._pending: list[_Pending] = []

    def close(self) -> None:
        """Let other processes use the folder."""
        self._lock.close()

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # -- before ---------------------------------------------------------------------------------------------------

    def survey(self, show_progress_bar: bool | None = None) -> Survey:
        """Tokenise the corpus and look at what is there.

        Args:
            show_progress_bar: None: only on a terminal.
        """
        all_keys, all_lengths, cut = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
        for chunk in self._chunks("reading", show_progress_bar):
            all_keys.append(_keys(chunk))
            all_lengths.append(np.array([len(prefix.ids) for prefix in chunk]))
            cut += sum(prefix.cut > 0 for prefix in chunk)
        keys, first = np.unique(np.concatenate(all_keys), return_index=True)
        lengths = np.concatenate(all_lengths)[first]
        before, written = self._keys_there()
        self._keys, self._done = keys, np.isin(keys, before)
        self._written = np.isin(keys, written) & ~self._done
        there = self._done | self._written
        sizes = {int(length): self._packing.nbytes(int(length)) for length in np.unique(lengths)}
        missing = lengths[~there]
        nbytes = sum(sizes[int(length)] for length in missing) + header_bytes(len(missing))
        count = sum(map(len, all_keys))
        return Survey(len(self.corpus), count, len(keys), int(there.sum()), nbytes if len(missing) else 0, cut)

    def expect_room(self, survey: Survey) -> None:
        """Check that what is missing fits on the disk.

        Raises: ValueError with the figures if it does not.
        """
        free = shutil.disk_usage(self.folder).free
        if survey.nbytes > free:
            raise ValueError(
                f"the index needs {size(survey.nbytes)} more, but {self.folder} has {size(free)} free; free "
                f"some space, name another disk, or lower max_document_tokens"
            )

    # -- the work -------------------------------------------------------------------------------------------------

    def run(self, survey: Survey, show_progress_bar: bool | None = None) -> None:
        """Compute what is missing. An interrupt (Ctrl-C) writes what is computed before it is raised.

        Args:
            survey: what `survey` has returned.
            show_progress_bar: None: only on a terminal.
        """
        if survey.missing:
            self._write_manifest(survey, complete=False)
        nbytes, taken_up = sum(flat.nbytes for _, flat, _ in self._pending), len(self._pending)
        with progress_bar(total=survey.missing, desc="index", unit=" documents", show=show_progress_bar) as progress:
            try:
                for chunk in self._chunks() if survey.missing else ():
                    for group in self._groups(chunk):
                        written = self._written[np.searchsorted(self._keys, _keys(group))]
                        if written.all():
                            continue
                        for (prefix, stored), there in zip(self._compute(group), written, strict=True):
                            if there:  # computed again with the others, so that the pass is the same each time
                                continue
                            self._pending.append((prefix_digest(prefix.ids).hex(), stored.block, stored.ready))
                            nbytes += stored.nbytes
                            progress.update()
                            if nbytes >= self.shard_bytes or len(self._pending) == _MAX_PREFIXES:
                                nbytes = taken_up = 0
                                self._write_shard()
            finally:  # also when something went wrong: what is computed is right
                if len(self._pending) > taken_up:
                    self._write_shard()
        self._write_manifest(survey, complete=True)

    def _groups(self, chunk: list[DocumentPrefix]) -> Iterator[list[DocumentPrefix]]:
        """Prefixes of a chunk that were missing when the run began, of similar length and within the token budget."""
        group: list[DocumentPrefix] = []
        for prefix in sorted(self._missing(chunk), key=lambda prefix: len(prefix.ids)):
            if group and (self.deterministic or (len(group) + 1) * len(prefix.ids) > self.max_tokens_per_batch):
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

    def _compute(self, group: list[DocumentPrefix]) -> Iterator[tuple[DocumentPrefix, PrefixKV]]:
        """Prefixes of a group; where they do not fit in memory, passes are half as large from then on."""
        return zip(group, in_halves(self._prefill, group, self._halve_budget), strict=True)

    @torch.no_grad()
    def _prefill(self, group: Sequence[DocumentPrefix]) -> list[PrefixKV]:
        with self.model.passes(evaluating=True):
            prefixes = self.model.engine.prefill([prefix.ids for prefix in group]).split(self._packing.dtype)
        return [self._link.to_host(prefix) for prefix in prefixes]

    def _halve_budget(self, _: int) -> None:
        self.max_tokens_per_batch = max(1, self.max_tokens_per_batch // 2)
        logger.warning("out of memory: continuing with max_tokens_per_batch=%d", self.max_tokens_per_batch)

    def _write_shard(self) -> None:
        pending, self._pending = self._pending, []
        for _, _, ready in pending:
            if ready is not None:
                ready.synchronize()
        path = self.folder / f"shard-{self._shards:06d}.safetensors"
        try:
            write_prefixes(
                path,
                [(name, flat) for name, flat, _ in pending],
                origin_of(self._settings["model"], self.deterministic, self._kv_dtype),
                self._mode,
            )
        except OSError as error:
            raise OSError(
                f"cannot write {path}: {error.strerror or error}; make room and run the same command again, it goes on"
            ) from None
        self._shards += 1

    def _chunks(self, title: str = "", show_progress_bar: bool | None = False) -> Iterator[list[DocumentPrefix]]:
        """The corpus in its order, tokenised chunk by chunk."""
        texts: list[dict] = []
        with progress_bar(
            total=len(self.corpus), desc=title, unit=" documents", delay=1, show=show_progress_bar
        ) as progress:
            for place, doc_id in enumerate(self.corpus, 1):
                texts.append(self.corpus[doc_id])
                if len(texts) == _CHUNK or place == len(self.corpus):
                    yield self.model.prompt.documents(self.splitter.parts(texts) if self.splitter else texts)
                    progress.update(len(texts))
                    texts = []

    # -- the folder -----------------------------------------------------------------------------------------------

    def _check_settings(self) -> dict:
        """The settings of this run, which an index that is there already must share."""
        passages = self.splitter.settings if self.splitter else None
        settings = settings_of(self.model, self.deterministic, self._kv_dtype, passages)
        if not (self.folder / MANIFEST).exists():
            if others := [file.name for file in self.folder.iterdir() if not file.name.startswith(".")]:
                raise ValueError(f"{self.folder} is no index and holds {others[0]}; name an empty or a new folder")
            return settings
        there = read_manifest(self.folder)
        if not there["complete"] and isinstance(first := there.get("first_shard"), int):
            self._first_shard = first
        expect_same_settings(self.folder, there, settings)
        return settings

    def _keys_there(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys of the prefixes in shards that were there when the run began, and in shards that it has written.

        A damaged shard is removed, so that its prefixes are computed again. The last one, if it is of this run and not
        full, is taken up to be filled.
        """
        keys: dict[bool, list[int]] = {False: [], True: []}
        paths = shard_paths(self.folder)
        numbers = [int(re.sub(r"\D", "", path.stem)) for path in paths]
        self._shards = max(numbers, default=-1) + 1
        if self._first_shard is None:
            self._first_shard = self._shards
        for number, path in zip(numbers, paths, strict=True):
            own = number >= self._first_shard
            try:
                contents = read_contents(path)
                expect_origin(contents.metadata, self._settings["model"], self.deterministic)
                if contents.dtype not in (None, self._packing.dtype):
                    raise OtherOrigin(f"its keys and values are {contents.dtype}")
                if own and number == max(numbers) and self._is_short(contents):
                    self._pending = [(name, self._read(extent), None) for name, extent in contents.extents.items()]
                    self._shards = number
                keys[own] += [_key(bytes.fromhex(name)) for name in contents.extents]
            except OtherOrigin as error:
                raise ValueError(
                    f"{path} does not belong to the index in its folder ({error}); move it away, and run the same "
                    "command again"
                ) from None
            except ValueError as error:
                logger.warning("%s is damaged (%s): it is removed, its documents are computed again", path, error)
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return np.array(keys[False], dtype=np.int64), np.array(keys[True], dtype=np.int64)

    def _is_short(self, contents: Contents) -> bool:
        nbytes = sum(extent.nbytes for extent in contents.extents.values())
        return nbytes < self.shard_bytes and len(contents.extents) < _MAX_PREFIXES

    def _read(self, extent: Extent) -> torch.Tensor:
        flat = torch.empty(extent.nbytes, dtype=torch.uint8)
        read_prefix(extent, flat)
        return flat.view(self._packing.dtype)

    def _write_manifest(self, survey: Survey, complete: bool) -> None:
        from ..utils.environment import VERSION

        shards = shard_paths(self.folder)
        begun = {} if complete else {"first_shard": self._first_shard}
        manifest = (
            self._settings
            | begun
            | {
                "complete": complete,
                "documents": survey.documents,
                "prefixes": survey.distinct,
                "shards": len(shards),
                "bytes": sum(path.stat().st_size for path in shards),
                "qpeft_version": VERSION,
            }
        )
        write_text(self.folder / MANIFEST, json.dumps(manifest, indent=1) + "\n", self._mode, follow=False)


def _key(digest: bytes) -> int:
    """The first 8 bytes of a digest, enough to tell documents apart; a clash only costs a computation later."""
    return int.from_bytes(digest[:8], "big", signed=True)


def _keys(chunk: list[DocumentPrefix]) -> np.ndarray:
    return np.array([_key(prefix_digest(prefix.ids)) for prefix in chunk], dtype=np.int64)
