"""`PartialRun`: a TREC run that grows block by block, survives a kill, and is resumed.

``RUN.part`` is plain TREC, so it can be read and evaluated at any time; ``RUN.part.json`` has the settings of the job.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO

import numpy as np

from ..utils.files import AnyPath
from ..utils.partial_file import PartialFile
from ..utils.words import counted
from .trec import Run, check_id, run_lines, written_ranking

_LARGEST = float(np.finfo(np.float32).max)


class PartialRun(PartialFile):
    """The rankings of a job that are finished, on the disk, in blocks of queries that are ranked at once.

    Args:
        path: The final name of the run, plain or .gz.
        candidates: query_id → (doc_id, score) of every query of the job.
        settings: Everything that the scores depend on, name → value; a part with other settings is refused.
        about: Further facts, which are written beside the settings for people to read.
        name: Name of the system, where several share ``path``.
        resume: Whether an earlier part is resumed; False starts over.
        tag: Last column of the run.
        blocks: The ids of ``candidates``, in their order, in the blocks that are ranked at once. By rounding, scores
            depend on the pairs in the same pass, so a block is resumed as a whole. None for one query per block.
        complete: Whether every candidate is ranked; False where some may be left out, for a threshold.

    Attributes:
        rankings: query_id → ranking as written, of all complete blocks.
        num_resumed: How many queries an earlier process has written.

    Raises:
        ValueError: For other settings, or ids with white space.
        OSError: If ``path`` cannot be written.
    """

    def __init__(
        self,
        path: AnyPath,
        candidates: Run,
        settings: dict[str, object],
        *,
        about: dict | None = None,
        name: str = "",
        resume: bool = True,
        tag: str = "qpeft_ext",
        blocks: Sequence[Sequence[str]] | None = None,
        complete: bool = True,
    ) -> None:
        self._candidates, self._tag, self._complete = candidates, tag, complete
        self.blocks = [[query_id] for query_id in candidates] if blocks is None else blocks
        self.rankings: Run = {}
        for query_id, ranking in candidates.items():
            check_id("query_id", query_id)
            for doc_id, _ in ranking:
                check_id("doc_id", doc_id)
        super().__init__(path, settings, about=about, name=name, resume=resume)
        self.num_resumed = len(self.rankings)

    def add(self, rankings: Mapping[str, Iterable[tuple[str, float]]]) -> None:
        """Append the next of ``blocks``.

        Args:
            rankings: query_id → (doc_id, score) for the queries of the block; sorted as by `RunWriter.add`.

        Raises:
            OSError: If the disk is full; earlier blocks stay complete.
            ValueError: For another block than the next.
        """
        if list(rankings) != list(self.blocks[self.num_pieces]):
            raise ValueError(f"block {self.num_pieces} of the run is of other queries")
        written = {query_id: written_ranking(query_id, ranking) for query_id, ranking in rankings.items()}
        self.append(self._lines(written))
        self.rankings |= written

    def __str__(self) -> str:
        return f"{self.part} keeps {len(self.rankings)} of {counted(len(self._candidates), 'queries')}"

    def _lines(self, rankings: Run) -> bytes:
        return b"".join(run_lines(query_id, ranking, self._tag) for query_id, ranking in rankings.items())

    def _take(self, piece: bytes) -> None:
        if self.num_pieces == len(self.blocks):
            raise ValueError("more blocks than the job has")
        rankings, lines = {}, piece.decode("utf-8").split("\n")
        for query_id in self.blocks[self.num_pieces]:
            start = f"{query_id} "
            count = next((place for place, line in enumerate(lines) if not line.startswith(start)), len(lines))
            own, lines = lines[:count], lines[count:]
            rankings[query_id] = [_document(line) for line in own]
            ranked = {doc_id for doc_id, _ in rankings[query_id]}
            known = {doc_id for doc_id, _ in self._candidates[query_id]}
            if len(ranked) < len(own) or not (ranked == known if self._complete else ranked <= known):
                raise ValueError(f"other documents of query {query_id!r}")
        if self._lines(rankings) != piece:
            raise ValueError("not what is written for these rankings")
        self.rankings |= rankings

    def _split(self, file: IO[bytes]) -> Iterator[bytes]:
        for block in self.blocks if self._complete else ():  # otherwise nothing says where a block ends
            yield b"".join(file.readline() for query_id in block for _ in self._candidates[query_id])


def _document(line: str) -> tuple[str, float]:
    """Return document and score of a line of a run. Raises: ValueError if it is no such line."""
    columns = line.split(" ")
    if len(columns) != 6 or not abs(score := float(columns[4])) <= _LARGEST:
        raise ValueError("no line of a run")
    return columns[2], score
