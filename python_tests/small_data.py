"""A BEIR folder of six documents with a run, and where the shared data lies; used by several tests."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

DOCUMENTS = {
    "d1": ("Tides", "The sea rises and falls twice a day because the moon pulls it."),
    "d2": ("Moon", "The moon goes around the earth in a month."),
    "d3": ("", "Harbours hold boats when the tide is low."),
    "d4": ("Wind", "Wind makes waves; waves are no tides."),
    "d5": ("", ""),
    "d6": ("", "???"),
}
QUERIES = {"q1": "why do tides rise", "q2": "boats at low tide", "q3": "moon month"}
QRELS = {"q1": {"d1": 2, "d4": 0}, "q2": {"d3": 1}, "q3": {"d2": 1}}
RUN = {
    "q1": [("d4", 3.0), ("d1", 2.0), ("d2", 1.0)],
    "q2": [("d3", 3.0), ("d1", 2.0), ("d5", 1.0)],
    "q3": [("d1", 2.0), ("d2", 2.0), ("d6", 1.0)],
}


def write_lines(path: Path, lines) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.name.endswith(".gz") else data)
    return path


def write_folder(folder: Path, ending: str = "") -> Path:
    """The data as a BEIR folder with ``run.trec``; ``ending`` may be ".gz"."""
    write_lines(
        folder / f"corpus.jsonl{ending}",
        (json.dumps({"_id": i, "title": title, "text": text}) for i, (title, text) in DOCUMENTS.items()),
    )
    write_lines(folder / f"queries.jsonl{ending}", (json.dumps({"_id": i, "text": t}) for i, t in QUERIES.items()))
    rows = [f"{q}\t{d}\t{grade}" for q, judged in QRELS.items() for d, grade in judged.items()]
    for split in ("test", "train"):
        write_lines(folder / "qrels" / f"{split}.tsv{ending}", ["query-id\tcorpus-id\tscore", *rows])
    write_lines(
        folder / f"run.trec{ending}",
        (
            f"{q} Q0 {d} {rank} {score} first"
            for q, ranking in RUN.items()
            for rank, (d, score) in enumerate(ranking, 1)
        ),
    )
    return folder


def shared_data(name: str) -> Path:
    """A folder of the shared data; skips the test where there is none."""
    place = os.environ.get("QPEFT_SHARED_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder := Path(place) / name).is_dir():
        pytest.skip(f"the shared data set {name} is not there; QPEFT_SHARED_DATA says where to look")
    return folder
