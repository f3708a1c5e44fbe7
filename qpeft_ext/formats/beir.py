"""BEIR folders: ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/<split>.tsv``, each plain or .gz.

The corpus is read once to find where each document lies; after that only the documents asked for are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from tqdm.auto import tqdm

from .io import (
    AnyPath,
    cache_folder,
    check_file,
    decode,
    is_gzip,
    line_error,
    open_bytes,
    parse_object,
    read_lines,
    reading,
    require_id,
    require_text,
    shorten,
)
from .trec import Qrels, add_judgement

_HEADER = ["query-id", "corpus-id", "score"]
_INDEX_VERSION = 1


class Corpus(Mapping[str, dict]):
    """Documents by id, without holding them in memory.

    The first use writes an index (id → place in the file) to the cache folder (`$QPEFT_CACHE`, else
    ``~/.cache/qpeft_ext``), and for a .gz file its unpacked text beside it. Later uses start at once, as long as
    size and modification time of the corpus are the same; an outdated index is replaced. Iteration follows the file.
    Safe to use from several threads and to hand to worker processes.

    Args:
        path: a BEIR folder, or the corpus file itself.
    Raises: ValueError naming file and line for a bad document; every line is checked when the index is built.
    """

    def __init__(self, path: AnyPath) -> None:
        self.path = find_file(path, "corpus.jsonl")
        self._open()

    def __getitem__(self, doc_id: str) -> dict[str, str]:
        """``{"id", "title", "text"}`` of one document; KeyError if there is none."""
        place = self._select("SELECT offset, length, line FROM documents WHERE id = ?", doc_id)
        if place is None:
            raise KeyError(doc_id)
        offset, length, number = place
        try:
            raw = self._read(length, offset)
        except OSError as error:
            raise OSError(f"{self.path}: {error.strerror}: the corpus cannot be read any more; bring it back") from None
        document = _document(self.path, number, decode(self.path, number, raw))
        if document["id"] != doc_id:
            raise line_error(self.path, number, f"expected document {doc_id!r}, got {document['id']!r}: the file was "
                                                f"changed while in use, or without a new modification time; touch it")
        return document

    def __contains__(self, doc_id: object) -> bool:
        return isinstance(doc_id, str) and self._select("SELECT 1 FROM documents WHERE id = ?", doc_id) is not None

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[str]:
        """Ids in the order of the file."""
        last = -1
        while True:  # in pages, so that no cursor stays open between two yields
            page = self._connection().execute(
                "SELECT offset, id FROM documents WHERE offset > ? ORDER BY offset LIMIT 10000", (last,)).fetchall()
            if not page:
                return
            for _, doc_id in page:
                yield doc_id
            last = page[-1][0]

    def __repr__(self) -> str:
        return f"Corpus({os.fspath(self.path)!r}, {len(self)} documents)"

    def __getstate__(self) -> dict:
        return {"path": self.path}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["path"])

    def _open(self) -> None:
        """Open the index, building it if there is none that fits."""
        status = self.path.stat()
        place = hashlib.sha256(os.fsencode(os.path.realpath(self.path))).hexdigest()[:16]
        content = f"{status.st_size}-{status.st_mtime_ns}-v{_INDEX_VERSION}"
        index = cache_folder() / f"corpus-{place}-{content}.sqlite"
        unpacked = index.with_suffix(".jsonl") if is_gzip(self.path) else None
        self._index = index
        for attempt in (1, 2):
            self._connections = threading.local()
            try:
                if not index.is_file():
                    raise sqlite3.DatabaseError("no index yet")
                self._file = open(unpacked or self.path, "rb", buffering=0)
                self._length, size = self._connection().execute("SELECT documents, bytes FROM whole").fetchone()
                if os.fstat(self._file.fileno()).st_size != size:
                    raise sqlite3.DatabaseError("the text has another size")
                return
            except (sqlite3.DatabaseError, FileNotFoundError, TypeError):
                if attempt == 2:
                    raise
                for outdated in cache_folder().glob(f"corpus-{place}-*"):
                    if not outdated.name.endswith(".tmp"):  # another process may be writing it
                        outdated.unlink(missing_ok=True)
                _build_index(self.path, index, unpacked)

    def _read(self, length: int, offset: int) -> bytes:
        return os.pread(self._file.fileno(), length, offset)

    def _connection(self) -> sqlite3.Connection:
        """One per thread and process: neither may share it, and a lock could be held at a fork."""
        mine = self._connections
        if getattr(mine, "pid", None) != os.getpid():
            mine.database = sqlite3.connect(f"{self._index.as_uri()}?mode=ro&immutable=1", uri=True)
            mine.pid = os.getpid()
        return mine.database

    def _select(self, query: str, doc_id: str) -> tuple | None:
        return self._connection().execute(query, (doc_id,)).fetchone()


def read_queries(path: AnyPath) -> dict[str, str]:
    """Read ``queries.jsonl``: query_id -> text, in the order of the file.

    Args:
        path: a BEIR folder, or the file itself.
    Raises: ValueError naming file and line; an empty query is an error.
    """
    path = find_file(path, "queries.jsonl")
    queries: dict[str, str] = {}
    for number, text in read_lines(path):
        record = parse_object(path, number, text)
        query_id = require_id(path, number, record)
        if query_id in queries:
            raise line_error(path, number, f"the query id {query_id!r} occurs twice; ids must be unique")
        queries[query_id] = require_text(path, number, record, "text")
    if not queries:
        raise ValueError(f'{path}: no queries; expected lines {{"_id", "text"}}')
    return queries


def read_qrels(path: AnyPath, split: str = "test") -> Qrels:
    """Read ``qrels/<split>.tsv``: query_id -> doc_id -> relevance.

    Args:
        path: a BEIR folder, or the file itself (``split`` is then not used).
    Raises: ValueError naming file and line; FileNotFoundError that lists the splits there are.
    """
    path = Path(path)
    if not path.is_file():
        try:
            path = find_file(path, f"qrels/{split}.tsv")
        except FileNotFoundError as error:
            there = splits(path)
            raise FileNotFoundError(f"{error}; splits there: {', '.join(there)}" if there else str(error)) from None
    qrels: Qrels = {}
    header = False
    for number, text in read_lines(path):
        columns = text.split("\t")
        if not header:
            if columns != _HEADER:
                raise line_error(path, number, f"expected the header line {'<tab>'.join(_HEADER)}, got {shorten(text)}")
            header = True
            continue
        if len(columns) != 3 or not all(column.strip() for column in columns):
            raise line_error(path, number, f"expected 3 columns {'<tab>'.join(_HEADER)}, got {shorten(text)}")
        add_judgement(qrels, path, number, *columns)
    if not qrels:
        raise ValueError(f"{path}: no judgements; expected a header line {'<tab>'.join(_HEADER)} and lines below it")
    return qrels


def splits(folder: AnyPath) -> list[str]:
    """Names of the splits a BEIR folder has qrels for."""
    return sorted({file.name.removesuffix(".gz").removesuffix(".tsv") for file in Path(folder).glob("qrels/*.tsv*")
                   if file.name.endswith((".tsv", ".tsv.gz"))})


def find_file(path: AnyPath, name: str) -> Path:
    """``path`` itself if it is a file; else ``name`` or ``name.gz`` in the folder ``path``."""
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder; expected a BEIR folder with {name}")
    for candidate in (path / name, path / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"{path} is no BEIR folder with {name}: neither {name} nor {name}.gz is there")


def _document(path: Path, number: int, text: str) -> dict[str, str]:
    """One checked line of the corpus. The text may be empty: such a document has a score too."""
    record = parse_object(path, number, text.rstrip())
    doc_id = require_id(path, number, record)
    title = "" if record.get("title") is None else require_text(path, number, record, "title", empty=True)
    return {"id": doc_id, "title": title, "text": require_text(path, number, record, "text", empty=True)}


def _build_index(path: Path, index: Path, unpacked: Path | None) -> None:
    """Read the whole corpus once: check every line and write the index (and the unpacked text of a .gz)."""
    mark = f".{os.urandom(6).hex()}.tmp"
    new_index = index.with_name(index.name + mark)
    new_text = unpacked.with_name(unpacked.name + mark) if unpacked else None
    try:
        with contextlib.closing(sqlite3.connect(new_index)) as database:
            database.executescript("""
                PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
                CREATE TABLE documents (offset INTEGER PRIMARY KEY, length INTEGER, line INTEGER, id TEXT UNIQUE);
                CREATE TABLE whole (documents INTEGER, bytes INTEGER);
            """)
            documents, size = 0, 0
            position = [0]
            with (open_bytes(check_file(path)) as source, reading(path, position),
                  open(new_text or os.devnull, "wb") as text_file,
                  tqdm(desc=f"indexing {path.name}", unit=" documents", delay=1, disable=None) as progress):
                for raw in source:
                    position[0] += 1
                    text = decode(path, position[0], raw)
                    if text.strip():
                        _add(database, path, position[0], text, size, len(raw))
                        documents += 1
                        progress.update()
                    text_file.write(raw)
                    size += len(raw)
                text_file.flush()
                if new_text:
                    os.fsync(text_file.fileno())
            if not documents:
                raise ValueError(f'{path}: the corpus is empty; expected lines {{"_id", "title", "text"}}')
            database.execute("INSERT INTO whole VALUES (?, ?)", (documents, size))
            database.commit()
        with open(new_index, "rb") as file:
            os.fsync(file.fileno())
        if new_text:
            os.replace(new_text, unpacked)
        os.replace(new_index, index)  # last: an index stands for a complete text
    except sqlite3.Error as error:
        raise OSError(f"cannot write the index {index} ({error}); free some space or set QPEFT_CACHE") from None
    finally:
        new_index.unlink(missing_ok=True)
        if new_text:
            new_text.unlink(missing_ok=True)


def _add(database: sqlite3.Connection, path: Path, number: int, text: str, offset: int, length: int) -> None:
    document = _document(path, number, text)
    try:
        database.execute("INSERT INTO documents VALUES (?, ?, ?, ?)", (offset, length, number, document["id"]))
    except sqlite3.IntegrityError:
        first, = database.execute("SELECT line FROM documents WHERE id = ?", (document["id"],)).fetchone()
        raise line_error(path, number, f"the document id {document['id']!r} was already on line {first}; "
                                       f"ids must be unique") from None
