"""The files of a job that `fuzz/files.py` damages, and what reads each of them."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from formats.format_readers import READERS, VALID
from jobs.tiny_job import make_job
from peft import LoraConfig, get_peft_model

import qpeft_ext as qpeft
from qpeft_ext import formats
from qpeft_ext.cli import main
from qpeft_ext.lm.loading import load_tokenizer

RERANK = "rerank --model {job}/adapter --data {job}/data --run {job}/data/run.trec --output {out} --device cpu"
UPR = "rerank --base-model {job}/lm --upr --data {job}/data --run {job}/data/run.trec --output {out} --device cpu"
PACKED = "rerank --base-model {job}/lm --upr --data {job}/gz --run {job}/gz/run.trec.gz --output {out} --device cpu"
BM25 = "retrieve --data {job}/data --output {out}"
BM25_GZ = "retrieve --data {job}/gz --output {out}"
EVALUATE = "evaluate --qrels {job}/data/qrels/test.tsv {job}/data/run.trec --output {out}.json"
FUSE = "fuse {job}/data/run.trec {job}/gz/run.trec.gz --output {out}"
LORA = RERANK.replace("/adapter", "/lora")
PART = RERANK.replace("{out}", "{job}/part/run.trec")
INDEX = UPR + " --index {job}/index"
AGAIN = "index {job}/data --out {job}/index --base-model {job}/lm --device cpu"
TRAIN = (
    "train --base-model {job}/lm --train {job}/train.jsonl --output {out} --num-negatives 1 --max-steps 1 "
    "--device cpu --generated-lora-rank 0"
)
RESUME = TRAIN.replace("{out}", "{job}/trained").replace("--max-steps 1", "--max-steps 3 --save-steps 1") + " --resume"
COMPARE = "compare {job}/plan.yaml --output {job}/compared --data-root {job} --device cpu"


@dataclass(frozen=True)
class Kind:
    """A file of the job (a pattern), and what reads it. exact: the result must be that of the undamaged file."""

    file: str
    command: str | Callable[[Path, Path], None]
    exact: bool = False
    weight: int = 4
    output: str = "{out}"

    @property
    def parts(self) -> set[str]:
        """Names of the job's files and folders that the command needs."""
        named = re.findall(r"\{job\}/([\w.]+)", self.command) if isinstance(self.command, str) else ["adapter"]
        return {self.file.partition("/")[0], "lm", "data", "cache", *named}


def predict_with_disk(job: Path, out: Path) -> None:
    cache = qpeft.DocumentCache(0, disk=job / "disk", disk_bytes=1 << 30)
    reranker = qpeft.Reranker.from_pretrained(job / "adapter", device="cpu", cache=cache)
    scores = reranker.predict([(query, text) for query in ("why tides", "moon") for text in ("sea", "the moon")])
    out.write_text("".join(f"{score:.4f}\n" for score in scores))


def reader(name: str) -> Callable[[Path, Path], None]:
    def read(job: Path, out: Path) -> None:
        out.write_text(f"{len(str(READERS[name](job / 'formats' / name.replace(' ', '-'))))}\n")

    return read


KINDS = [
    Kind("adapter/adapter_config.json", RERANK, weight=8), Kind("adapter/adapter_model.safetensors", RERANK),
    Kind("lm/config.json", UPR, weight=6), Kind("lm/tokenizer.json", UPR), Kind("lm/tokenizer_config.json", UPR),
    Kind("lm/model.safetensors", UPR), Kind("lm/generation_config.json", UPR, weight=1),
    Kind("lora/lm_adapter/adapter_config.json", LORA, weight=6),
    Kind("lora/lm_adapter/adapter_model.safetensors", LORA),
    Kind("data/corpus.jsonl", RERANK), Kind("data/queries.jsonl", UPR), Kind("data/qrels/test.tsv", UPR),
    Kind("data/run.trec", RERANK), Kind("data/corpus.jsonl", BM25), Kind("data/queries.jsonl", BM25),
    Kind("gz/corpus.jsonl.gz", PACKED), Kind("gz/queries.jsonl.gz", PACKED), Kind("gz/run.trec.gz", PACKED),
    Kind("gz/qrels/test.tsv.gz", PACKED), Kind("data/qrels/test.tsv", EVALUATE, output="{out}.json"),
    Kind("data/run.trec", EVALUATE, output="{out}.json"),
    Kind("gz/run.trec.gz", FUSE), Kind("data/run.trec", FUSE),
    Kind("index/manifest.json", INDEX, weight=6), Kind("index/shard-*", INDEX, exact=True, weight=8),
    Kind("index/shard-*", AGAIN, output="{job}/index/manifest.json"),
    Kind("disk/*.safetensors", predict_with_disk, exact=True, weight=8),
    Kind("cache/corpus-*.sqlite", BM25_GZ, exact=True), Kind("cache/corpus-*.jsonl", BM25_GZ, exact=True),
    Kind("cache/corpus-*.jsonl", PACKED, exact=True), Kind("cache/bm25-*/*", BM25_GZ, exact=True, weight=6),
    Kind("part/run.trec.part", PART, exact=True, output="{job}/part/run.trec", weight=6),
    Kind("part/run.trec.part.json", PART, exact=True, output="{job}/part/run.trec"),
    Kind("plan.yaml", COMPARE, weight=4, output="{job}/compared/comparison.json"),
    Kind("compared/*/*/*/result.json", COMPARE, weight=1, output="{job}/compared/comparison.json"),
    Kind("compared/*/*/*/run.trec.gz", COMPARE, output="{job}/compared/comparison.json", weight=1),
    Kind("train.jsonl", TRAIN, output="{out}/adapter_config.json"),
    Kind("trained/checkpoints/checkpoint-2/*.json", RESUME, output="{job}/trained/adapter_config.json", weight=2),
    Kind("trained/checkpoints/checkpoint-2/*", RESUME, output="{job}/trained/adapter_config.json", weight=2),
    *(Kind(f"formats/{name.replace(' ', '-')}", reader(name), weight=1) for name in READERS),
]  # fmt: skip


def make_whole(job: Path) -> None:
    """Everything undamaged, in ``job``."""
    make_job(job)
    for source in [*(job / "data").rglob("*.*")]:
        target = job / "gz" / f"{source.relative_to(job / 'data')}.gz"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(gzip.compress(source.read_bytes(), mtime=0))
    lm = get_peft_model(qpeft.load_lm(job / "lm"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    tokenizer = load_tokenizer(job / "lm")
    qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="top_k", rank=4), tokenizer).save_pretrained(job / "lora")
    config = job / "lora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(job / "lm")}))
    (job / "formats").mkdir()
    for name, contents in VALID.items():
        (job / "formats" / name.replace(" ", "-")).write_bytes(contents[0])
    (job / "train.jsonl").write_text(
        "".join(
            json.dumps(
                {"query": f"tide {i}?", "positives": [f"the moon {i} pulls"], "negatives": [f"boat {i}", "wind"]}
            )
            + "\n"
            for i in range(12)
        )
    )
    (job / "plan.yaml").write_text(
        f"lm: {job}/lm\ndtype: float32\nmeasures: [nDCG@10, RR@10]\nseeds: [0]\noptions: {{max_document_tokens: 40}}\n"
        "collections:\n  tiny: &it\n    data: data\n    split: test\n    candidates: 3\n"
        "  again:\n    <<: *it\n    queries: 2\nmethods:\n  UPR: {method: upr}\n  similarity: {method: similarity}\n"
    )
    (job / "part").mkdir()


def warm(job: Path, out: Path, commands: set) -> None:
    """Run every command once here, so that children find all modules imported and all caches filled."""
    if PART in commands:
        finish, formats.PartialRun.finish = formats.PartialRun.finish, lambda self: self.close()
        assert main(arguments(PART, job, out)) == 0  # leaves its part, whole
        formats.PartialRun.finish = finish
    first = {INDEX: AGAIN, RESUME: RESUME.replace("--max-steps 3", "--max-steps 2").replace(" --resume", "")}
    for command in [first[command] for command in first if command in commands] + sorted(
        command for command in commands if isinstance(command, str) and command not in (PART, RESUME)
    ):
        assert main(arguments(command, job, out)) == 0, command
        for left in out.parent.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    if predict_with_disk in commands:
        predict_with_disk(job, out)
        out.unlink()
    for left in (job / "trained").glob("[!c]*"):  # the checkpoints alone: as a kill would leave them
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def arguments(command: str, job: Path, out: Path) -> list[str]:
    return [word.format(job=job, out=out) for word in command.split()]
