"""Formats of data sets, one module each, behind one interface: `open_collection` recognises the format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..utils.files import AnyPath
from . import beir, dpr, hf_datasets, ir_datasets, jsonl, msmarco, rankllm, upr
from .beir import Corpus, read_queries
from .collection import Collection, Glance
from .io import read_lines
from .jsonl import read_examples, training_examples, write_examples
from .partial_run import PartialRun
from .qrels import read_table
from .trec import Qrels, Run, RunWriter, read_run, without_identical_ids, write_run

__all__ = [
    "Collection",
    "Corpus",
    "PartialRun",
    "Qrels",
    "Run",
    "RunWriter",
    "open_collection",
    "read_examples",
    "read_judgements",
    "read_qrels",
    "read_queries",
    "read_run",
    "training_examples",
    "without_identical_ids",
    "write_examples",
    "write_run",
]

# in the order in which they are asked whether they recognise a file or folder
FORMATS = (
    beir.Folder,
    msmarco.Folder,
    upr.Folder,
    hf_datasets.Dataset,
    upr.RetrieverFile,
    dpr.TrainingFile,
    rankllm.RequestsFile,
    jsonl.ExamplesFile,
    jsonl.CorpusFile,
    dpr.PassagesFile,
    dpr.Questions,
    msmarco.TopFile,
    msmarco.CollectionFile,
)


def open_collection(data: AnyPath) -> Collection:
    """Open a data set of any format.

    Args:
        data: A folder or file, ``hf:owner/name``, or an id of ir_datasets.

    Returns:
        The data set.

    Raises:
        ValueError: If no format recognises it; the message lists what was looked for.
        FileNotFoundError: If there is no such file, folder or id.
    """
    path, name = Path(data), str(data)
    if name.startswith(hf_datasets.PREFIX):
        return hf_datasets.Dataset(name)
    if not path.exists():
        return _open_id(name)
    glance = Glance(path)
    for format in FORMATS:
        if format.recognises(glance):
            return format(data)
    if glance.error:
        raise glance.error
    if len(glance.columns) == 1 and len(glance.columns[0].split()) == 6:
        raise ValueError(
            f"{data} looks like a TREC run, which has no texts; give it as --run, and the collection it "
            f"belongs to as --data"
        )
    kind = "folder" if glance.is_folder else "file"
    looked_for = (format.looks_for for format in FORMATS if (kind == "folder") == ("a folder" in format.looks_for))
    raise ValueError(f"{data}: a {kind} of no known format; looked for {'; '.join(filter(None, looked_for))}")


def _open_id(name: str) -> Collection:
    """Open an id of ir_datasets. Raises: FileNotFoundError if it is none."""
    try:
        return ir_datasets.Dataset(name)
    except (ValueError, ImportError) as error:
        why = "; ir_datasets knows no such id" if isinstance(error, ValueError) else f" ({error})"
    raise FileNotFoundError(
        f"{name}: no such file or folder; expected {beir.Folder.looks_for}, of another format, "
        f"{hf_datasets.PREFIX}owner/name, or {ir_datasets.Dataset.looks_for}{why}"
    )


def read_judgements(data: AnyPath, split: str | None, runs: Sequence[Run]) -> Qrels:
    """Read qrels to evaluate runs with.

    Args:
        data: A qrels file, or a collection that judges by its qrels or by answers.
        split: Split of the collection; None for the default one.
        runs: The runs, whose passages are judged where there are only answers.

    Returns:
        query_id → doc_id → relevance.

    Raises:
        ValueError: If the collection judges nothing, or a split is named beside a qrels file.
    """
    if _is_qrels_file(Path(data)):
        if split is not None:
            raise ValueError(
                f"{data} is a qrels file, which has no split {split}; leave the split out, or name a folder"
            )
        return read_qrels(data)
    collection = open_collection(data)
    if not {"qrels", "answers"} & set(collection.parts):
        raise collection.lacks("qrels")
    qrels = collection.judge(collection.choose_split(split) if collection.splits else None, runs)
    if qrels is None:
        raise collection.lacks("qrels")
    return qrels


def _is_qrels_file(path: Path) -> bool:
    if not path.exists():
        return path.suffix in (".tsv", ".txt", ".gz", ".qrels")  # `read_qrels` says that there is no such file
    if not (path.is_dir() or path.is_file()):
        return True  # a pipe, of which nothing may be read to find out what it is
    return path.is_file() and not Glance(path).record and not dpr.Questions.recognises(Glance(path))


def read_qrels(path: AnyPath) -> Qrels:
    """Read a qrels file.

    Args:
        path: A table (BEIR's or TREC's), or json of a retriever, whose labels are read (UPR's).

    Returns:
        query_id → doc_id → relevance.
    """
    for _, text in read_lines(path, "qrels") if Path(path).is_file() else ():  # a pipe is read once, as a table
        if text.lstrip("\ufeff")[:1] in ("[", "{"):
            return upr.RetrieverFile(path).qrels()
        break
    return read_table(path)
