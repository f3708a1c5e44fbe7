"""The commands that `fuzz/kill_many.py` interrupts, and the job that they work on."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from families.tiny import tiny_lm, tiny_tokenizer
from jobs.compare_job import make_compare_job, write_plan
from small_data import write_lines

import qpeft_ext as qpeft

QUERIES, CANDIDATES, DOCUMENTS = 24, 8, 40
WORDS = "tide moon sea boat harbour wind wave month earth low high pull rope lamp fog gull net pier map sail".split()


@dataclass
class Command:
    """arguments: of the folder for its output.  resumed: those after it was ended, if others.
    made: which files of that folder are compared.  share: how often it is drawn.
    """

    name: str
    arguments: Callable[[Path], list[str]]
    resumed: Callable[[Path], list[str]] | None = None
    made: Callable[[Path], bool] = lambda path: True
    share: float = 1.0
    expected: dict[str, bytes] = field(default_factory=dict)
    seconds: float = 0.0


def make_job(folder: Path) -> Path:
    draw = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    data = folder / "data"
    write_lines(
        data / "corpus.jsonl",
        (json.dumps({"_id": f"d{i}", "title": "", "text": text(1, 14)}) for i in range(DOCUMENTS)),
    )
    write_lines(data / "queries.jsonl", (json.dumps({"_id": f"q{i}", "text": text(1, 4)}) for i in range(QUERIES)))
    write_lines(
        data / "run.trec",
        (
            f"q{i} Q0 d{(i * 11 + 3 * rank) % DOCUMENTS} {rank} {-rank}.0 first"
            for i in range(QUERIES)
            for rank in range(CANDIDATES)
        ),
    )
    write_lines(
        data / "qrels" / "test.tsv",
        ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i * 11 % DOCUMENTS}\t1" for i in range(QUERIES))],
    )
    write_lines(
        folder / "train.jsonl",
        (
            json.dumps({"query": text(1, 4), "positives": [text(2, 9)], "negatives": [text(2, 9), text(2, 9)]})
            for _ in range(12)
        ),
    )
    make_compare_job(folder / "compared")
    for dtype in (torch.float32, torch.bfloat16):
        lm = folder / str(dtype).removeprefix("torch.")
        tiny_lm("llama").to(dtype).save_pretrained(lm)
        tiny_tokenizer().save_pretrained(lm)
        for clues, options in (
            ("top_k", {"generated_lora_rank": 4, "target_modules": ("o_proj",)}),
            ("attention", {"num_heads": 4}),
        ):
            model = qpeft.get_qpeft_model(qpeft.load_lm(lm), qpeft.QPeftConfig(clues=clues, rank=8, **options))
            torch.manual_seed(0)
            for module in model.trained_modules.values():
                for parameter in module.parameters():
                    torch.nn.init.normal_(parameter, std=0.3)
            model.save_pretrained(folder / f"{clues}-{lm.name}")
    return folder


def commands(job: Path) -> Iterator[Command]:
    for dtype in ("float32", "bfloat16"):
        yield from _rerank_commands(job, dtype)
        yield from _other_commands(job, dtype)
    places = {"data": job / "data", "run": job / "data" / "run.trec"}
    for name, text in (
        ("fuse", "fuse {run} {run} --output {out}/fused.trec.gz"),
        ("convert", "convert {data} {out}/made.jsonl --to rankllm --run {run}"),
        ("retrieve", "retrieve --data {data} --output {out}/bm25.trec"),
    ):
        yield Command(name, _made_of(text, **places), share=0.3)


def _made_of(text: str, **values: object) -> Callable[[Path], list[str]]:
    """The arguments of a command, by the folder for its output; values may have blanks."""
    return lambda out: [word.format(out=out, **values) for word in text.split()]


def _rerank_commands(job: Path, dtype: str) -> Iterator[Command]:
    def rerank(clues: str, name: str, *options: str) -> Callable[[Path], list[str]]:
        device = "" if "--devices" in options else " --device cpu"
        text = "rerank --model {model} --data {data} --run {data}/run.trec --output {out}/{name} --measures RR@10"
        made = _made_of(text + device, model=job / f"{clues}-{dtype}", data=job / "data", name=name)
        return lambda out: [*made(out), *options]

    index = str(job / f"index-{dtype}")
    yield Command(f"rerank {dtype}", rerank("top_k", "run.trec"), share=2)
    yield Command(f"rerank attention {dtype}", rerank("attention", "run.trec"), share=2)
    yield Command(f"rerank .gz {dtype}", rerank("attention", "run.trec.gz"), share=2)
    yield Command(f"rerank --upr {dtype}", rerank("top_k", "run.trec", "--upr", "--similarity-only"), share=2)
    yield Command(f"rerank --index {dtype}", rerank("attention", "run.trec", "--index", index))
    yield Command(
        f"rerank cached {dtype}", rerank("attention", "run.trec", "--cache-bytes", "1000000", "--deterministic")
    )
    yield Command(f"rerank two workers {dtype}", rerank("top_k", "run.trec", "--devices", "cpu,cpu"), share=0.05)


def _other_commands(job: Path, dtype: str) -> Iterator[Command]:
    places = {"job": job, "data": job / "data", "lm": job / dtype}
    index = "index {data} --out {out}/index --base-model {lm} --max-tokens-per-batch 256 --device cpu"
    yield Command(f"index {dtype}", _made_of(index, **places), share=2)
    synthesize = (
        "synthesize --data {data} --base-model {lm} --output {out}/made.jsonl --max-new-tokens 6 --keep-unfinished "
        "--min-tokens 1 --no-round-trip --queries-per-document 5 --num-negatives 2 --max-tokens-per-batch 400 "
        "--device cpu"
    )
    yield Command(f"synthesize {dtype}", _made_of(synthesize, **places))
    train = (
        "train --base-model {lm} --train {job}/train.jsonl --output {out}/adapter --num-negatives 2 --rank 4 "
        "--generated-lora-rank 0 --save-steps 1 --deterministic --device cpu"
    )
    yield Command(
        f"train {dtype}",
        _made_of(train, **places),
        _made_of(f"{train} --resume", **places),
        made=lambda path: path.parent.name == "adapter" and path.name != "README.md",
    )
    plan = job / f"plan-{dtype}.yaml"
    write_plan(
        plan,
        job / "compared",
        ["upr: {method: upr}", "ours: {method: q_peft_r, learning_rate: 0.01}"],
        **{
            "cache_bytes: 1_000_000": "cache_bytes: 0",
            "seeds: [0, 1]": "seeds: [0]",
            "dtype: float32": f"dtype: {dtype}",
        },
    )
    compare = "compare {plan} --output {out}/results --data-root {job}/compared --device cpu"
    yield Command(
        f"compare {dtype}",
        _made_of(compare, plan=plan, **places),
        made=lambda path: path.name in ("run.trec.gz", "adapter_model.safetensors"),
        share=0.5,
    )
