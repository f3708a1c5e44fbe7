"""Teacher scores: what a reranker gives the documents of training examples, for another one to be trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from ..formats.collection import Example
from ..formats.jsonl import read_examples
from ..utils.console import say
from ..utils.partial_file import PartialFile, kept, written_with
from ..utils.progress import progress_bar
from ..utils.words import counted
from .job import check_queries
from .systems import Systems, SystemsSpec

if TYPE_CHECKING:
    from .reranker import Reranker

_BLOCK = 64  # examples that are scored together, and kept together
_SIDES = {"positives": "positive_scores", "negatives": "negative_scores"}


def with_teacher_scores(reranker: Reranker, examples: Sequence[Example]) -> list[Example]:
    """Score the documents of training examples.

    Args:
        reranker: the teacher.
        examples: each with "query", "positives" and "negatives".
    Returns: the examples with "positive_scores" and "negative_scores", which the losses "margin_mse" and
        "kl_divergence" read; scores that an example has already are replaced.
    Raises: ValueError for a teacher whose scores depend on the other documents of the query.
    """
    pairs = [(example["query"], document) for example in examples for side in _SIDES for document in example[side]]
    scores = iter(np.asarray(reranker.predict(pairs, show_progress_bar=False)))
    return [
        dict(example) | {name: [float(f"{next(scores):.7g}") for _ in example[side]] for side, name in _SIDES.items()}
        for example in examples
    ]


def _without_scores(examples: Sequence[Example]) -> list[tuple[str, int, int]]:
    """Return what scores belong to: each query, and how many documents of both kinds it has."""
    return [(example["query"], *(len(example[side]) for side in _SIDES)) for example in examples]


class PartialExamples(PartialFile):
    """Training examples with teacher scores that are finished; each block is some lines of ``OUTPUT.part``.

    Args:
        path, settings, about, resume: as for `PartialFile`.
        count: how many examples the whole job has.
    Attributes:
        examples: those of all complete blocks.
    """

    start_over = "--overwrite (resume=False)"

    def __init__(self, path: Path, settings: dict, count: int, *, about: dict | None = None, resume: bool = True):
        self.examples: list[Example] = []
        self._count = count
        super().__init__(path, settings, about=about, resume=resume)

    def add(self, examples: Sequence[Example]) -> None:
        """Append a block."""
        self.append("".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples).encode("utf-8"))
        self.examples += examples

    def __str__(self) -> str:
        return f"{self.part} keeps the teacher's scores of {len(self.examples)} of {counted(self._count, 'examples')}"

    def _take(self, piece: bytes) -> None:
        self.examples += map(json.loads, piece.decode("utf-8").split("\n")[:-1])  # other line ends are in texts

    def _split(self, file: IO[bytes]) -> Iterator[bytes]:
        return iter(())  # all have checksums


def teach(
    spec: SystemsSpec, device: str | None, examples: Sequence[Example], path: Path, *, overwrite: bool = False
) -> list[Example]:
    """Write training examples with the scores of a teacher, from where an interrupted process stopped.

    Scores that are there already, of the same teacher and the same examples, are read instead.

    Args:
        spec: the teacher; its first system scores.
        device: where it runs.
        examples: training examples.
        path: the file, JSON lines; ``PATH.json`` beside it says what they were made with.
        overwrite: whether to replace scores that were made with something else.
    Returns: the examples with their scores.
    Raises: ValueError for a query that is too long for the teacher, or a file that was made with something else.
    """
    content = hashlib.sha256(json.dumps(list(examples), sort_keys=True).encode()).hexdigest()[:16]
    settings = spec.model_settings() | {"truncate_queries": spec.truncate_queries, "examples": content}
    if path.exists():
        problem = written_with(path, settings)
        if not problem:
            found = read_examples(path)
            if _without_scores(found) == _without_scores(examples):
                say(f"{path}: the teacher's scores are there")
                return found
            problem = "was changed since it was made: it has other examples"
        if not overwrite:
            raise ValueError(f"{path} {problem}; name another file, or --overwrite")
    check_queries(
        spec.prompt(), {str(i): example["query"] for i, example in enumerate(examples)}, spec.truncate_queries
    )
    partial = PartialExamples(path, settings, len(examples), about=spec.about(), resume=not overwrite)
    with kept(partial), progress_bar(total=len(examples), desc="teacher", unit=" examples") as bar:
        bar.update(len(partial.examples))
        if len(partial.examples) < len(examples):
            reranker = Systems(spec, device).rerankers[spec.names[0]]
            for start in range(len(partial.examples), len(examples), _BLOCK):
                partial.add(with_teacher_scores(reranker, examples[start : start + _BLOCK]))
                bar.update(len(partial.examples) - start)
        partial.finish()
    say(f"wrote the teacher's scores of {counted(len(examples), 'examples')} to {path}")
    return partial.examples
