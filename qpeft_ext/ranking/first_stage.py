"""BM25 as a first stage, through the library ``bm25s``."""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import formats
from ..formats.corpus import drop_leftovers
from ..formats.trec import Run, system_name
from ..utils.console import say
from ..utils.files import (
    cache_folder,
    folder_permissions,
    permissions_of,
    restrict,
    sync_folder,
    why_unreadable,
    write_text,
)
from ..utils.optional import import_bm25s
from ..utils.progress import progress_bar
from ..utils.small_files import open_regular, read_json
from ..utils.text import shorten
from ..utils.words import counted

logger = logging.getLogger(__name__)

LARGEST_K1 = 1_000_000  # bm25s divides by k1 in float32, where scores of a much larger one would be 0
_WORD = r"(?u)[^\W_]+"
_INDEX_VERSION = 2  # of how tokens are made, and of what is kept
_SUMS = "checksums.json"


class BM25:
    """A searchable index over the titles and texts of a corpus.

    Tokens are made by bm25s: lower case, runs of letters and digits (an underscore separates, so that names in code
    are found by their parts), without the longer of its English stop word lists, no stemming. The default k1 and b are
    the values that MS MARCO and BEIR baselines use, not bm25s' own.

    The index of a corpus that knows its `fingerprint` (every collection on disk) is kept in the cache folder
    (`$QPEFT_CACHE`), one for each corpus, k1 and b; it is replaced when the corpus changes, and read as a memory map.

    Args:
        corpus: doc_id → a dict with "text" and perhaps "title", for instance a `formats.Corpus`.
        k1: how much repeated words count, from 0 to 1,000,000.
        b: how much long documents lose, from 0 to 1.
        show_progress_bar: None shows it on a terminal only.
    Raises: ImportError without bm25s; ValueError for an empty corpus or values that make no BM25.
    """

    def __init__(
        self, corpus: Mapping[str, dict], *, k1: float = 0.9, b: float = 0.4, show_progress_bar: bool | None = None
    ) -> None:
        try:
            bm25s = import_bm25s()
        except ImportError:
            raise ImportError("BM25 needs the package bm25s: pip install 'qpeft_ext[bm25]'") from None
        if not (0 <= k1 <= LARGEST_K1 and 0 <= b <= 1):
            raise ValueError(f"BM25: k1 must be from 0 to {LARGEST_K1:,} and b from 0 to 1, got {k1} and {b}")
        if not len(corpus):
            raise ValueError("BM25: the corpus is empty")
        self.k1, self.b = abs(k1), abs(b)  # -0.0 would be shown, and named in the cache, as another value than 0
        self._mode = permissions_of(getattr(corpus, "path", None))
        self.doc_ids = list(corpus)
        self._show_progress_bar = show_progress_bar
        self._tokenizer = bm25s.tokenization.Tokenizer(
            lower=True, splitter=_WORD, stopwords="english_plus", stemmer=None
        )
        name = self._cache_name(corpus, bm25s.__version__)
        self._index = (self._load(name) if name else None) or self._build(corpus)
        if name and self._index and not (cache_folder() / name).exists():
            self._save(name)

    def search(self, query: str, k: int) -> list[tuple[str, float]]:
        """Return (doc_id, score) of the ``k`` best documents, best first; equal scores in the order of the corpus.

        Only documents that have a word of the query are among them.
        """
        if self._index is None:
            return []
        known = next(self._tokenizer.streaming_tokenize([query], update_vocab=False, allow_empty=False))
        return _best(self._index.get_scores(known), self.doc_ids, k) if known else []

    def _build(self, corpus: Mapping[str, dict]) -> Any:
        """Make the index of bm25s; None where no document has a word."""
        bm25s = import_bm25s()
        # one text at a time, so that the corpus is never kept as text; int32 takes an eighth of a list of ints
        ids = progress_bar(self.doc_ids, desc="BM25: reading", unit=" documents", delay=1, show=self._show_progress_bar)
        texts = (f"{document.get('title') or ''} {document['text']}" for document in map(corpus.__getitem__, ids))
        tokens = [
            np.asarray(row, dtype=np.int32) for row in self._tokenizer.streaming_tokenize(texts, allow_empty=False)
        ]
        vocabulary = self._tokenizer.get_vocab_dict()
        if not vocabulary:
            return None
        index = bm25s.BM25(k1=self.k1, b=self.b, method="lucene", backend="numpy")
        index.index((tokens, vocabulary), show_progress=False)
        return index

    def _cache_name(self, corpus: Mapping[str, dict], version: str) -> str | None:
        fingerprint = getattr(corpus, "fingerprint", None)
        settings = f"k1={_exactly(self.k1)}-b={_exactly(self.b)}-{version}-v{_INDEX_VERSION}"
        return fingerprint and f"bm25-{fingerprint()}-{settings}"

    def _load(self, name: str) -> Any:
        """Read the index from the cache folder; None if there is none that can be read."""
        bm25s = import_bm25s()
        folder = cache_folder() / name
        if not folder.is_dir():
            return None
        try:
            if read_json(folder / _SUMS) != _sums(folder):
                raise ValueError("wrong checksum")
            index = bm25s.BM25.load(folder, mmap=True, show_progress=False)
            if index.scores["num_docs"] != len(self.doc_ids):
                raise ValueError("another number of documents")
        except MemoryError:
            raise
        except Exception as error:  # bm25s and numpy raise a dozen kinds for a damaged file
            if unreadable := why_unreadable(error):
                logger.warning("%s cannot be read (%s): the index is built, and not kept", folder, unreadable)
                return None
            logger.warning("%s is damaged (%s); it is built again", folder, shorten(error, 100))
            shutil.rmtree(folder, ignore_errors=True)
            return None
        self._tokenizer.word_to_id = dict(index.vocab_dict)
        return index

    def _save(self, name: str) -> None:
        """Keep the index as a whole or not at all, and drop those of the corpus as it was before."""
        drop_leftovers("bm25-")
        folder = cache_folder() / name
        for other in cache_folder().glob(f"{'-'.join(name.split('-')[:3])}-*"):
            if name.split("-k1=")[0] != other.name.split("-k1=")[0] and not other.name.endswith(".tmp"):
                shutil.rmtree(other, ignore_errors=True)
        temporary = folder.with_name(f"{name}.{os.urandom(6).hex()}.tmp")
        try:
            temporary.mkdir(folder_permissions(self._mode))
            self._index.save(temporary, show_progress=False)
            write_text(temporary / _SUMS, json.dumps(_sums(temporary)))
            for file in temporary.iterdir():
                restrict(file, self._mode)
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
            _rename_folder(temporary, folder)
        except OSError as error:
            raise OSError(
                f"cannot keep the BM25 index in {folder} ({error.strerror or error}); free some space or set "
                f"QPEFT_CACHE"
            ) from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def bm25_run(
    corpus: Mapping[str, dict],
    queries: Mapping[str, str],
    k: int = 100,
    *,
    k1: float = 0.9,
    b: float = 0.4,
    show_progress_bar: bool | None = None,
) -> Run:
    """Search the ``k`` best documents for every query by `BM25` over title and text.

    Args:
        corpus, k1, b, show_progress_bar: as for `BM25`.
        queries: query_id → text.
        k: documents per query, at most as many as the corpus has.
    Returns: the run, queries in their given order. Documents without any word of the query are not in it, so a
        query may have fewer than ``k`` candidates, or none.
    Raises: as `BM25`; ValueError for k < 1.
    """
    if k < 1:
        raise ValueError(f"bm25_run: k must be at least 1, got {k}")
    index = BM25(corpus, k1=k1, b=b, show_progress_bar=show_progress_bar)
    items = progress_bar(queries.items(), desc="BM25: searching", unit=" queries", delay=1, show=show_progress_bar)
    return {query_id: index.search(text, k) for query_id, text in items}


def _best(scores: np.ndarray, doc_ids: list[str], k: int) -> list[tuple[str, float]]:
    """Return the ``k`` best of ``scores`` [documents] above zero; equal scores in the order of the corpus."""
    if len(scores) > k:
        kth = np.partition(scores, -k)[-k]
        places = np.flatnonzero((scores >= kth) & (scores > 0))
    else:
        places = np.flatnonzero(scores > 0)
    places = places[np.argsort(-scores[places], kind="stable")][:k]
    return [(doc_ids[place], float(scores[place])) for place in places]


def _exactly(value: float) -> str:
    """Return a number as a text that no other number has; six digits where they are enough."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def _sums(folder: Path) -> dict[str, int]:
    """CRC-32 of the files of an index in the cache folder, where a flipped bit would be another ranking."""
    sums = {}
    for path in sorted(folder.iterdir()):
        if path.name != _SUMS:
            with open_regular(path) as file:
                sums[path.name] = 0
                while block := file.read(1 << 20):
                    sums[path.name] = zlib.crc32(block, sums[path.name])
    return sums


def _rename_folder(temporary: Path, folder: Path) -> None:
    try:
        os.rename(temporary, folder)
    except OSError:
        if not folder.is_dir():  # else another process was quicker; its index is the same
            raise
    sync_folder(folder.parent)


def asked_queries(data: formats.Collection, split: str | None) -> dict[str, str]:
    """Return the queries of a split: where it has qrels, those that are judged; else all.

    Raises: ValueError if no query is judged.
    """
    if split is not None:
        data.choose_split(split)
    queries = data.queries(split)
    if data.format in ("upr", "dpr questions", "dpr folder") or not data.has("qrels", split):
        return queries
    judged = {query_id: queries[query_id] for query_id in data.qrels(split) if query_id in queries}
    if not judged:
        raise ValueError(f"{data.place}: no query of the qrels is among the queries; the files do not belong together")
    return judged


def first_stage(
    data: formats.Collection,
    split: str | None,
    queries: dict[str, str],
    run: Path | None,
    k: int,
    ignore_identical_ids: bool = False,
) -> tuple[Run, str]:
    """Return the candidates and a name for them: those of a run file, else the collection's own, else BM25's.

    Args:
        data: the collection.
        split: whose candidates; None for its default split.
        queries: query_id → text, for BM25.
        run: the run file, or None.
        k: candidates per query, at most.
        ignore_identical_ids: whether documents with the id of their query are left out before the cut.
    """
    searched = run is None and not data.has("candidates", split)
    if searched:
        # one more than asked for, which may be the query itself
        whole, name = bm25_run(data.corpus, queries, k + ignore_identical_ids), "BM25"
    else:
        whole = formats.read_run(run) if run else data.candidates(split)
        name = system_name(run) if run else "candidates"
    if ignore_identical_ids:
        whole, identical = formats.without_identical_ids(whole)
        say_identical(name, identical)
    cut = {query_id: candidates[:k] for query_id, candidates in whole.items()}
    left_out = sum(len(candidates) for candidates in whole.values()) - sum(map(len, cut.values()))
    if left_out and not searched:
        say(
            f"{run or data.place}: "
            + counted(
                left_out,
                f"candidates beyond the {k} best of their query are left out",
                f"candidate beyond the {k} best of its query is left out",
            )
        )
    return cut, name


def say_identical(name: str, count: int) -> None:
    """Print how many candidates with the id of their query are left out of a run."""
    say(
        f"{name}: "
        + counted(
            count,
            "candidates with the id of their query are left out",
            "candidate with the id of its query is left out",
        )
    )
