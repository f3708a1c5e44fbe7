"""`FileCorpus`: the documents of one file by id, in any order, without keeping them in memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from tqdm.auto import tqdm

from ..utils.files import AnyPath, cache_folder, is_gzip, permissions_of, restrict, why_unreadable
from ..utils.progress import progress_bar
from ..utils.small_files import open_regular
from ..utils.words import counted
from .io import check_kept, decode, line_error, open_bytes, parse_object, reading, require_id, require_text

logger = logging.getLogger(__name__)

_INDEX_VERSION = 3
_BUILDING = threading.Lock()
Document = dict[str, str]  # "id", "title", "text"


class FileCorpus(Mapping[str, Document]):
    """Documents by id: ``corpus["d7"]`` is ``{"id", "title", "text"}``. Iteration follows the file.

    The first use writes an index (id → offset in the file) to the cache folder (`$QPEFT_CACHE`, or
    ``~/.cache/qpeft_ext``), together with the uncompressed text of a .gz file, or with the distinct documents of a file
    that does not have one per line. Later uses start at once while size and modification time of the file are the
    same; an outdated index is replaced. An interrupted build leaves no index. A corpus may be used from several threads
    and handed to worker processes.

    A format is a subclass with `format` and either `parse` (one document per line) or `documents`.

    Raises: ValueError naming file and line for a bad document; every one is checked when the index is built.
    """

    format: ClassVar[str] = ""  # part of the name of the index
    expected: ClassVar[str] = ""  # content of a proper file, for the error about an empty one
    by_lines: ClassVar[bool] = True  # False: `documents`, which may be repeated, are copied to the cache

    def __init__(self, path: AnyPath) -> None:
        self.path = check_kept(path, "a corpus")
        self._left: list = []
        self._open()

    def parse(self, number: int, text: str) -> Document | None:
        """Return the checked document of a line; None for a line without one, such as a header.

        Args:
            number: Number of the line, from 1.
            text: The line.

        Raises:
            ValueError: For a bad document; the message names file and line.
        """
        raise NotImplementedError

    def documents(self) -> Iterator[tuple[int, Document]]:
        """Yield (line, checked document) where documents are not lines. A repeated document must be the same."""
        raise NotImplementedError

    def __getitem__(self, doc_id: str) -> Document:
        """Return one document. Raises: KeyError if there is none of that id."""
        try:
            number, raw = self._raw(doc_id)
        except _Damaged as error:
            self._build_again(error)
            number, raw = self._raw(doc_id)
        text = decode(self.path, number, raw)
        document = self.parse(number, text) if self.by_lines else parse_object(self._file.name, number, text)
        if document is None or document.get("id") != doc_id:
            raise line_error(
                self.path,
                number,
                f"expected document {doc_id!r}, got {document and document.get('id')!r}"
                f": the file was changed while in use, or without a new modification "
                f"time; touch it",
            )
        return document

    def _raw(self, doc_id: str) -> tuple[int, bytes]:
        """Return line and bytes of a document. Raises: `_Damaged`; KeyError if there is no such document."""
        place = self._select("SELECT offset, length, line, check_sum FROM documents WHERE id = ?", doc_id)
        if place is None:
            raise KeyError(doc_id)
        offset, length, number, check_sum = place
        if not all(type(value) is int and 0 <= value < 1 << 62 for value in (offset, length, number)):
            raise _Damaged("not a place in a file")
        if length > os.fstat(self._file.fileno()).st_size:
            raise _Damaged("a document longer than its file")
        try:
            raw = self._read(length, offset)
        except OSError as error:
            raise OSError(f"{self.path}: {error.strerror}: the corpus cannot be read any more; bring it back") from None
        if check_sum is not None and zlib.crc32(raw) != check_sum:
            raise _Damaged("a text with another checksum")
        return number, raw

    def _build_again(self, reason: Exception) -> None:
        """Replace a damaged index or copy of the texts."""
        with _BUILDING:
            logger.warning("%s is damaged (%s); it is built again", self._index, reason)
            self._left.append(self._file)  # another thread may be reading from it
            _remove(self._index)
            self._open()

    def __contains__(self, doc_id: object) -> bool:
        query = "SELECT 1 FROM documents WHERE id = ?"
        if not isinstance(doc_id, str):
            return False
        try:
            return self._select(query, doc_id) is not None
        except _Damaged as error:
            self._build_again(error)
            return self._select(query, doc_id) is not None

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[str]:
        last = -1
        while True:  # in pages, so that no cursor stays open between two yields
            query = "SELECT offset, id FROM documents WHERE offset > ? ORDER BY offset LIMIT 10000"
            try:
                page = self._connection().execute(query, (last,)).fetchall()
            except sqlite3.DatabaseError as error:
                self._build_again(error)
                page = self._connection().execute(query, (last,)).fetchall()
            if not page:
                return
            for _, doc_id in page:
                yield doc_id
            last = page[-1][0]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({os.fspath(self.path)!r}, {counted(len(self), 'documents')})"

    def __getstate__(self) -> dict:
        return {"path": self.path}

    def __setstate__(self, state: dict) -> None:
        self.path = state["path"]
        self._left = []
        self._open()

    def version(self) -> str:
        """Return a text that changes with the file, but not with its path."""
        status = self.path.stat()
        return f"{status.st_size} bytes of {status.st_mtime_ns / 1e9:.6f}"

    def fingerprint(self) -> str:
        """Return a text that changes with path, size, modification time or format of the file."""
        status = self.path.stat()
        place = hashlib.sha256(os.fsencode(os.path.realpath(self.path))).hexdigest()[:16]
        return f"{place}-{self.format}-{status.st_size}-{status.st_mtime_ns}-v{_INDEX_VERSION}"

    def _open(self) -> None:
        """Open the index, and build it first if there is none that fits."""
        name = f"corpus-{self.fingerprint()}"
        index = cache_folder() / f"{name}.sqlite"
        copy = None if self.by_lines and not is_gzip(self.path) else index.with_suffix(".jsonl")
        self._index = index
        for attempt in (1, 2):
            self._connections = threading.local()
            try:
                if not index.is_file():
                    raise sqlite3.DatabaseError("no index yet")
                open_regular(index).close()  # sqlite does not say why it cannot open a file
                self._file = open_regular(copy or self.path, buffering=0)
                self._length, size = self._connection().execute("SELECT documents, bytes FROM whole").fetchone()
                if os.fstat(self._file.fileno()).st_size != size:
                    raise sqlite3.DatabaseError("the text has another size")
                if type(self._length) is not int:
                    raise sqlite3.DatabaseError("the number of documents is none")
                for file in filter(None, (index, copy)):  # the corpus may have become private after they were made
                    restrict(file, permissions_of(self.path))
                return
            except (sqlite3.DatabaseError, OSError, TypeError, ValueError) as error:
                if attempt == 2 or why_unreadable(error):  # which building it again would not change
                    raise
                if index.exists():
                    logger.warning("the index %s is damaged or does not fit; it is built again", index)
                for file in filter(None, (index, copy)):
                    _remove(file)
                for file in cache_folder().glob(f"{'-'.join(name.split('-')[:3])}-*"):
                    if not file.name.endswith(".tmp") and file.stem != name:  # another process may be writing those
                        file.unlink(missing_ok=True)
                _build_index(self, index, copy)

    def _read(self, length: int, offset: int) -> bytes:
        return os.pread(self._file.fileno(), length, offset)

    def _connection(self) -> sqlite3.Connection:
        """Return the connection of this thread and process, which neither threads nor a fork may share."""
        mine = self._connections
        if getattr(mine, "pid", None) != os.getpid():
            mine.database = sqlite3.connect(f"{self._index.as_uri()}?mode=ro&immutable=1", uri=True)
            mine.pid = os.getpid()
        return mine.database

    def _select(self, query: str, doc_id: str) -> tuple | None:
        try:
            return self._connection().execute(query, (doc_id,)).fetchone()
        except sqlite3.DatabaseError as error:
            raise _Damaged(str(error)) from None


class _Damaged(ValueError):
    """The index, or the copy of the texts, was changed after it was written."""


def _remove(path: Path) -> None:
    """Remove the file or folder at a name of the cache."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def json_document(
    path: AnyPath, number: int, record: dict[str, Any], id_key: str = "_id", text_key: str = "text"
) -> Document:
    """Return the checked document of a JSON object. The text may be empty: such a document has a score too."""
    doc_id = require_id(path, number, record, id_key)
    title = "" if record.get("title") is None else require_text(path, number, record, "title", empty=True)
    return {"id": doc_id, "title": title, "text": require_text(path, number, record, text_key, empty=True)}


def drop_leftovers(prefix: str) -> None:
    """Remove temporary files of killed processes from the cache folder: those not written to for an hour."""
    for left in cache_folder().glob(f"{prefix}*.tmp"):
        with contextlib.suppress(OSError):  # gone already
            if time.time() - left.stat().st_mtime > 3600:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def _build_index(corpus: FileCorpus, index: Path, copy: Path | None) -> None:
    """Read the whole corpus once, check every document, and write the index and the copy, if there is one."""
    drop_leftovers("corpus-")
    mark = f".{os.urandom(6).hex()}.tmp"
    new_index = index.with_name(index.name + mark)
    new_copy = copy.with_name(copy.name + mark) if copy else None
    try:
        for new in filter(None, (new_index, new_copy)):
            os.close(os.open(new, os.O_CREAT | os.O_EXCL, permissions_of(corpus.path)))
        with (
            contextlib.closing(sqlite3.connect(new_index)) as database,
            open(new_copy or os.devnull, "wb") as file,
            progress_bar(desc=f"indexing {corpus.path.name}", unit=" documents", delay=1) as progress,
        ):
            database.executescript("""
                PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
                CREATE TABLE documents (offset INTEGER PRIMARY KEY, length INTEGER, line INTEGER, id TEXT, check_sum);
                CREATE TABLE whole (documents INTEGER, bytes INTEGER);
            """)
            size = (_add_lines if corpus.by_lines else _add_documents)(corpus, database, file, progress)
            (count,) = database.execute("SELECT count(*) FROM documents").fetchone()
            if not count:
                raise ValueError(f"{corpus.path}: the corpus is empty; expected {corpus.expected}")
            database.execute("INSERT INTO whole VALUES (?, ?)", (count, size))
            database.commit()
            if new_copy:
                file.flush()
                os.fsync(file.fileno())
        with open(new_index, "rb") as file:
            os.fsync(file.fileno())
        if new_copy and copy:
            os.replace(new_copy, copy)
        os.replace(new_index, index)  # last: an index promises a complete text
    except sqlite3.Error as error:
        raise OSError(f"cannot write the index {index} ({error}); free some space or set QPEFT_CACHE") from None
    finally:
        new_index.unlink(missing_ok=True)
        if new_copy:
            new_copy.unlink(missing_ok=True)


def _add_lines(corpus: FileCorpus, database: sqlite3.Connection, copy, progress: tqdm) -> int:
    """Add a document per line. Returns: the bytes of the text."""
    position, size, packed = [0], 0, is_gzip(corpus.path)
    with open_bytes(corpus.path) as source, reading(corpus.path, position):
        for raw in source:
            position[0] += 1
            text = decode(corpus.path, position[0], raw)
            if text.strip() and (document := corpus.parse(position[0], text)):
                check_sum = zlib.crc32(raw) if packed else None  # of what is copied
                database.execute(
                    "INSERT INTO documents VALUES (?, ?, ?, ?, ?)",
                    (size, len(raw), position[0], document["id"], check_sum),
                )
                progress.update()
            copy.write(raw)
            size += len(raw)
    try:  # sorted once at the end: of six million ids in random order, 2.5 times faster than one by one
        database.execute("CREATE UNIQUE INDEX by_id ON documents (id)")
    except sqlite3.IntegrityError:
        first, second, doc_id = database.execute(
            "SELECT min(line), max(line), id FROM documents GROUP BY id HAVING count(*) > 1 ORDER BY max(line) LIMIT 1"
        ).fetchone()
        raise line_error(
            corpus.path, second, f"the document id {doc_id!r} was already on line {first}; ids must be unique"
        ) from None
    return size


def _add_documents(corpus: FileCorpus, database: sqlite3.Connection, copy, progress: tqdm) -> int:
    """Add documents that may be repeated, unchanged. Returns: the bytes of the copy."""
    size = 0
    database.execute("CREATE UNIQUE INDEX by_id ON documents (id)")
    for number, document in corpus.documents():
        raw = json.dumps(document, ensure_ascii=False).encode("utf-8") + b"\n"
        known = database.execute("SELECT check_sum, line FROM documents WHERE id = ?", (document["id"],)).fetchone()
        if known is None:
            database.execute(
                "INSERT INTO documents VALUES (?, ?, ?, ?, ?)",
                (size, len(raw), int(number), document["id"], zlib.crc32(raw)),
            )
            copy.write(raw)
            size += len(raw)
            progress.update()
        elif known[0] != zlib.crc32(raw):
            raise line_error(
                corpus.path,
                number,
                f"document {document['id']!r} has another text than on line {known[1]}; ids must be unique",
            )
    return size
