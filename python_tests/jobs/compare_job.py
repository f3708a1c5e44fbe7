"""A tiny comparison: a BEIR folder with three splits, a tiny LM, a plan of all kinds of methods, and its results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jobs.tiny_job import save_lm
from small_data import write_lines

from qpeft_ext import formats
from qpeft_ext.cli import main

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
METHODS = [
    "UPR: {method: upr}",
    "hard clues: {method: hard_clues, options: {k: 3}}",
    "similarity: {method: similarity}",
    "LoRA: {method: lora, learning_rate: 1e-2, peft: {r: 2}}",
    "Q-PEFT-A: {method: q_peft_a, learning_rate: 1e-2, vary: {training.queries: [2]}}",
    "LoRA + BM25: {method: fusion, of: LoRA}",
]


def words(start: int, count: int) -> list[str]:
    return [WORDS[(start * 7 + i * (1 + start % 5)) % len(WORDS)] for i in range(count)]


def make_compare_job(folder: Path) -> Path:
    """Write ``data`` and ``lm`` into ``folder``: query i has the first words of document i."""
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
    """Write a plan; ``changes`` maps parts of its text to other text."""
    text = PLAN.format(lm=job / "lm", methods="\n".join(f"  {method}" for method in methods))
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


def compare(plan, job, output, *options) -> int:
    return main(command(plan, job, output, *options))


def command(plan, job, output, *options) -> list[str]:
    return [
        "compare",
        str(plan),
        "--data-root",
        str(job),
        "--output",
        str(output),
        "--device",
        "cpu",
        *map(str, options),
    ]


def results(output) -> dict:
    """Read the results of a comparison by (method, seed)."""
    found = [json.loads(path.read_text()) for path in sorted(output.glob("*/*/*/result.json"))]
    return {(result["method"], result["seed"]): result for result in found}


def runs(output) -> dict:
    return {
        path.parent.relative_to(output).as_posix(): formats.read_run(path)
        for path in sorted(output.glob("*/*/*/run.trec.gz"))
    }


def assert_same_runs(ours, theirs, most: float = 1e-4) -> None:
    """Both have the same candidates, with scores that differ by ``most`` at most."""
    assert ours.keys() == theirs.keys()
    for name, run in ours.items():
        assert {q: dict(r) for q, r in run.items()} == {
            q: pytest.approx(dict(r), abs=most) for q, r in theirs[name].items()
        }, name
