"""File formats, one module each: ``beir`` folders, ``trec`` runs and qrels, ``jsonl`` training examples."""

from . import beir, trec
from .beir import Corpus, read_queries
from .io import AnyPath, read_lines
from .jsonl import read_examples, training_examples, write_examples
from .partial_run import PartialRun
from .trec import Qrels, Run, RunWriter, read_run, write_run

__all__ = [
    "Corpus", "PartialRun", "Qrels", "Run", "RunWriter", "read_examples", "read_qrels", "read_queries",
    "read_run", "training_examples", "write_examples", "write_run",
]


def read_qrels(path: AnyPath) -> Qrels:
    """Read a qrels file of either format: BEIR's if it starts with that header, else TREC's."""
    for _, text in read_lines(path, "qrels"):
        return beir.read_qrels(path) if text.startswith("query-id\t") else trec.read_qrels(path)
    raise ValueError(f"{path}: the qrels are empty; expected a BEIR tsv or TREC qrels")
