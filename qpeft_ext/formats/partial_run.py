"""`PartialRun`: a TREC run that grows query by query, survives a kill, and is gone on with.

``RUN.part`` is plain TREC, so it can be looked at and evaluated at any time; ``RUN.part.json`` says which job it is of.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from ..utils.files import AnyPath, AtomicWriter, is_gzip, sync_folder
from .partial_file import PartialFile
from .trec import Run, check_id, run_lines, written_ranking


class PartialRun(PartialFile):
    """The queries of a job that are ranked so far, on the disk; each is a piece of a `PartialFile`.

    Queries are added in the order of ``candidates``, each with all its candidates.

    Args:
        path: the final name of the run, plain or .gz.
        candidates: query_id -> (doc_id, score) of every query of the job.
        settings, about, name, resume: of `PartialFile`; ``name`` is the system's, where several share ``path``.

    Attributes: rankings: query_id -> ranking as written, of all complete queries.
        num_resumed: how many of them an earlier process has written.
    Raises: as `PartialFile`; ValueError for ids that no run can hold.
    """

    def __init__(
        self, path: AnyPath, candidates: Run, settings: dict[str, object], *, about: dict | None = None,
        name: str = "", resume: bool = True, tag: str = "qpeft_ext",
    ) -> None:
        self._candidates, self._tag = candidates, tag
        self.rankings: Run = {}
        for query_id, ranking in candidates.items():
            check_id("query_id", query_id)
            for doc_id, _ in ranking:
                check_id("doc_id", doc_id)
        super().__init__(path, settings, about=about, name=name, resume=resume)
        self.num_resumed = sum(map(bool, self.rankings.values()))

    def add(self, query_id: str, ranking: Iterable[tuple[str, float]]) -> None:
        """Append one query; see `RunWriter.add`. Raises: OSError if the disk is full; earlier queries stay whole."""
        ranking = written_ranking(query_id, ranking)
        self.append(run_lines(query_id, ranking, self._tag))
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

    def __str__(self) -> str:
        return f"{self.part} keeps {len(self.rankings)} of {len(self._candidates)} queries"

    def _read(self) -> int:
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
