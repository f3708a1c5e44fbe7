"""A disk that is full: one line that names the file, and nothing half-written. Files may not grow beyond a limit here,
which gives the same kind of error."""

import pytest
from jobs.processes import forked_command
from jobs.tiny_job import copy_job

pytestmark = pytest.mark.slow


RERANK = "rerank --model {job}/adapter --data {job}/data --run {job}/data/run.trec --output {out} --device cpu"
TRAIN = (
    "train --base-model {job}/lm --data {job}/data --output {out} --num-negatives 1 --max-steps 2 --device cpu "
    "--generated-lora-rank 0"
)
COMMANDS = {  # name: (command, bytes that a file may have, what the line names)
    "run": (RERANK, 150, "out"),
    "packed run": (RERANK.replace("{out}", "{out}.gz"), 150, "out.gz"),
    "settings of a run": (RERANK, 10, "out.part"),
    "cache": ("retrieve --data {job}/data --output {out}", 4000, "cache/corpus-"),
    "BM25": ("retrieve --data {job}/data --output {out}", 60, "cache/bm25-"),
    "table": ("evaluate --qrels {job}/data/qrels/test.tsv {job}/data/run.trec --output {out}", 50, "out"),
    "fused run": ("fuse {job}/data/run.trec {job}/data/run.trec --output {out}", 50, "out"),
    "converted": ("convert {job}/data {out} --to rankllm --run {job}/data/run.trec", 200, "out"),
    "shard": ("index {job}/data --out {out} --base-model {job}/lm --device cpu", 5000, "out/shard-000000.safetensors"),
    "manifest": ("index {job}/data --out {out} --base-model {job}/lm --device cpu", 100, "out/manifest.json"),
    "adapter": (TRAIN, 2000, "out/adapter_model.safetensors"),
    "checkpoint": (TRAIN + " --save-steps 1", 10_000, "checkpoint-1"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_line_names_the_file(name, whole_job, tmp_path, monkeypatch):
    command, most, named = COMMANDS[name]
    job, out = copy_job(whole_job, tmp_path / "job"), tmp_path / "out"
    monkeypatch.setenv("QPEFT_CACHE", str(tmp_path / "cache"))
    if name != "cache":
        from qpeft_ext.formats.beir import Corpus

        Corpus(job / "data" / "corpus.jsonl")  # so that it is not the corpus' index that is too large
    code, _, err = forked_command([word.format(job=job, out=out) for word in command.split()], room=most).end()
    lines = err.splitlines()
    assert code == 2 and lines, lines
    assert str(tmp_path / named) in lines[-1] or name == "checkpoint" and named in lines[-1], lines
    assert "File too large" in lines[-1] or "disk I/O error" in lines[-1], lines
    left = [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp") or path == out and path.is_file()]
    assert not left
