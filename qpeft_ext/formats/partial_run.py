"""`PartialRun`: a TREC run that grows query by query, survives a kill, and is gone on with.

``RUN.part`` is plain TREC, so it can be looked at and evaluated at any time; ``RUN.part.json`` says which job it is of.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable

from .io import AnyPath, AtomicWriter, check_target, is_gzip, sync_folder, write_text
from .trec import Run, check_id, run_lines, written_ranking


class PartialRun:
    """The queries of a job that are ranked so far, on the disk.

    Queries are added in the order of ``candidates``, each with all its candidates, and each reaches the file before
    `add` returns: a kill costs at most the query being written. Opening the same job again finds the complete queries
    and cuts off a torn one. One process at a time may hold it.

    Args:
        path: the final name of the run, plain or .gz; the part lies beside it.
        candidates: query_id -> (doc_id, score) of every query of the job.
        settings: what the scores depend on, name -> value; a part of a job with other settings is refused.
        about: what else to write beside the settings, for people.
        name: of the system, where several share ``path``; it becomes part of the file's name.
        resume: False starts over.

    Attributes: part: the growing file.  rankings: query_id -> ranking as written, of all complete queries.
        num_resumed: how many of them an earlier process has written.
    Raises: ValueError for other settings, or ids that no run can hold; OSError if ``path`` cannot be written.
    """

    def __init__(
        self, path: AnyPath, candidates: Run, settings: dict[str, object], *, about: dict | None = None,
        name: str = "", resume: bool = True, tag: str = "qpeft_ext",
    ) -> None:
        self.target = check_target(path)
        self.part = self.target.with_name(f"{self.target.name}{f'.{name}' if name else ''}.part")
        self._about = self.part.with_name(f"{self.part.name}.json")
        self._candidates, self._tag = candidates, tag
        self._size: int | None = None  # bytes of complete queries; None while the file is not ours
        self.rankings: Run = {}
        for query_id, ranking in candidates.items():
            check_id("query_id", query_id)
            for doc_id, _ in ranking:
                check_id("doc_id", doc_id)
        check_target(self.part)
        try:
            self._file = os.open(self.part, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OSError(f"cannot write {path}: {error.strerror}; choose another place") from None
        try:
            self._lock()
            if resume and os.fstat(self._file).st_size:
                self._expect_settings(json.loads(json.dumps(settings)))
                self._size = self._read()
            else:
                self._size = 0
            self._cut()
            if not self._size:
                write_text(self._about, json.dumps({"settings": settings} | (about or {}), indent=2) + "\n")
        except BaseException:
            self.close()
            raise
        self.num_resumed = sum(map(bool, self.rankings.values()))

    def add(self, query_id: str, ranking: Iterable[tuple[str, float]]) -> None:
        """Append one query; see `RunWriter.add`. Raises: OSError if the disk is full; earlier queries stay whole."""
        ranking = written_ranking(query_id, ranking)
        rest = memoryview(run_lines(query_id, ranking, self._tag))
        size = self._size + len(rest)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            self._cut()
            raise OSError(f"cannot write {self.part}: {error.strerror}; make room for it") from None
        self._size = size
        self.rankings[query_id] = ranking

    def finish(self) -> None:
        """All queries are there: give the run its name, and keep the settings beside it as ``RUN.json``."""
        os.fsync(self._file)
        if is_gzip(self.target):
            with AtomicWriter(self.target) as whole, open(self.part, "rb") as part:
                while data := part.read(1 << 20):
                    whole.write(data)
            self.part.unlink()
        else:
            os.replace(self.part, self.target)
            sync_folder(self.target.parent)
        os.replace(self._about, self.target.with_name(f"{self.target.name}.json"))
        self.close()

    def discard(self) -> None:
        """Nothing of it is kept."""
        self.part.unlink(missing_ok=True)
        self._about.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Let go of the file; what is in it can be gone on with. A part without any query is removed."""
        if self._file is None:
            return
        if self._size:
            self._cut()
        elif self._size == 0:
            self.part.unlink(missing_ok=True)
            self._about.unlink(missing_ok=True)
        os.close(self._file)
        self._file = None

    def __str__(self) -> str:
        return f"{self.part} keeps {len(self.rankings)} of {len(self._candidates)} queries"

    def _lock(self) -> None:
        """The lock goes with the process, however it ends."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.part} is being written by another process; let it end, or write to another "
                             "file") from None
        except OSError:
            pass  # a file system without locks

    def _expect_settings(self, settings: dict) -> None:
        try:
            then = json.loads(self._about.read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{self.part} is of an unknown job, since {self._about.name} is missing or damaged; "
                             "start over with --no-resume (resume=False)") from None
        differences = [f"{name} was {then.get(name)}, is {settings.get(name)}"
                       for name in (*settings, *(name for name in then if name not in settings))
                       if then.get(name) != settings.get(name)]
        if differences:
            raise ValueError(f"{self.part} is of a job with other settings: {'; '.join(differences)}; give those again "
                             "to go on with it, or start over with --no-resume (resume=False)")

    def _read(self) -> int:
        """Read the complete queries; the number of bytes they take."""
        size = 0
        with open(self.part, "rb") as file:
            for query_id, candidates in self._candidates.items():
                lines = [file.readline() for _ in candidates]
                ranking = _parsed(query_id, lines)
                if ranking is None or {d for d, _ in ranking} != {d for d, _ in candidates}:
                    break  # not written yet, or torn by a kill
                self.rankings[query_id] = ranking
                size += sum(map(len, lines))
        return size

    def _cut(self) -> None:
        """Drop what stands behind the complete queries."""
        with contextlib.suppress(OSError):  # it is dropped when the part is read, at the latest
            os.ftruncate(self._file, self._size)
            os.lseek(self._file, self._size, os.SEEK_SET)


def _parsed(query_id: str, lines: list[bytes]) -> list[tuple[str, float]] | None:
    """The ranking in the lines of one query, or None if one of them is not whole."""
    ranking = []
    for rank, line in enumerate(lines, start=1):
        columns = line.decode("utf-8", errors="replace").split(" ")
        if len(columns) != 6 or not line.endswith(b"\n") or (columns[0], columns[3]) != (query_id, str(rank)):
            return None
        try:
            ranking.append((columns[2], float(columns[4])))
        except ValueError:
            return None
    return ranking
