"""A reranking job of many blocks, for tests that end it in the middle."""

from __future__ import annotations

from pathlib import Path

from jobs.tiny_job import save_adapter, save_lm
from small_data import write_lines

QUERIES, CANDIDATES, DOCUMENTS = 128, 16, 60
WORDS = "tide moon sea boat harbour wind wave month earth low high pull rope lamp fog gull net pier map sail".split()


def make_long_job(folder: Path) -> Path:
    """Write ``data`` with ``run.trec``, ``lm`` and ``adapter`` into ``folder``: 8 blocks of 256 pairs."""

    def words(start: int, count: int) -> str:
        return " ".join(WORDS[(start * 7 + i * (1 + start % 5)) % len(WORDS)] for i in range(count))

    write_lines(
        folder / "data" / "corpus.jsonl",
        (f'{{"_id": "d{i}", "title": "", "text": "{words(i, 3 + i % 9)}"}}' for i in range(DOCUMENTS)),
    )
    write_lines(
        folder / "data" / "queries.jsonl",
        (f'{{"_id": "q{i}", "text": "{words(i, 2 + i % 3)}"}}' for i in range(QUERIES)),
    )
    write_lines(
        folder / "data" / "run.trec",
        (
            f"q{i} Q0 d{(i * 11 + 3 * rank) % DOCUMENTS} {rank} {-rank}.0 first"
            for i in range(QUERIES)
            for rank in range(CANDIDATES)
        ),
    )
    save_lm(folder / "lm")
    save_adapter(folder / "adapter", folder / "lm")
    return folder


def command(job: Path, output: Path, *options) -> list[str]:
    place = [] if "--devices" in options else ["--device", "cpu"]
    return [
        "rerank",
        "--model",
        str(job / "adapter"),
        "--data",
        str(job / "data"),
        "--run",
        str(job / "data" / "run.trec"),
        "--output",
        str(output),
        *place,
        *map(str, options),
    ]
