"""A tiny comparison: a BEIR folder with three splits, a tiny LM, and a plan of all kinds of methods."""

from __future__ import annotations

import json
from pathlib import Path

from jobs.tiny_job import save_lm
from small_data import write_lines

WORDS = "tide moon sea boat harbour wind wave month earth low high pull rope lamp fog gull net pier map sail".split()
SPLITS = {"test": range(0, 8), "train": range(8, 20), "dev": range(20, 25)}

PLAN = """
lm: {lm}
dtype: float32
seeds: [0, 1]
measures: [nDCG@10, RR@10, CandidateRecall@2]
cache_bytes: 1_000_000
options: {{max_document_tokens: 40, loss: listwise, in_batch_negatives: false, rank: 4, num_heads: 4}}
training: {{queries: 4, negatives: 2, depth: 8, queries_per_step: 2}}
collections:
  tiny:
    data: data
    split: test
    candidates: 6
    train: {{data: data, split: train}}
    dev: {{data: data, split: dev}}
methods:
{methods}
"""


def words(start: int, count: int) -> list[str]:
    return [WORDS[(start * 7 + i * (1 + start % 5)) % len(WORDS)] for i in range(count)]


def make_compare_job(folder: Path) -> Path:
    """``data`` and ``lm`` in ``folder``: query i asks with the first words of document i."""
    write_lines(
        folder / "data" / "corpus.jsonl",
        (json.dumps({"_id": f"d{i}", "title": "", "text": " ".join(words(i, 4 + i % 5))}) for i in range(30)),
    )
    write_lines(
        folder / "data" / "queries.jsonl",
        (json.dumps({"_id": f"q{i}", "text": f"{i} {' '.join(words(i, 2 + i % 2))}"}) for i in range(30)),
    )
    for split, places in SPLITS.items():
        write_lines(
            folder / "data" / "qrels" / f"{split}.tsv",
            ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in places)],
        )
    save_lm(folder / "lm")
    return folder


def write_plan(path: Path, job: Path, methods: list[str], **changes: str) -> Path:
    """``changes``: text of the plan -> other text."""
    text = PLAN.format(lm=job / "lm", methods="\n".join(f"  {method}" for method in methods))
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path
