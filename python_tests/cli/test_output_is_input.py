"""An output that is one of the inputs, under whatever name, is refused before anything is read or written."""

import os

import pytest
from small_data import write_folder

from qpeft_ext.cli import main

OUTPUTS = {  # name: (command, what it would replace)
    "evaluate, run": ("evaluate --qrels {data}/qrels/test.tsv {data}/run.trec other --output {out}", "run.trec"),
    "evaluate, qrels": ("evaluate --qrels {data}/qrels/test.tsv {data}/run.trec --output {out}", "qrels/test.tsv"),
    "fuse, run": ("fuse other {data}/run.trec --output {out}", "run.trec"),
    "fuse, dev qrels": (
        "fuse a b --method scores --dev-run c --dev-run d --dev-qrels {data}/qrels/test.tsv --output {out}",
        "qrels/test.tsv",
    ),
    "rerank, run": ("rerank --upr --base-model LM --data {data} --run {data}/run.trec --output {out}", "run.trec"),
    "rerank, data": ("rerank --upr --base-model LM --data {data}/corpus.jsonl --output {out}", "corpus.jsonl"),
    "retrieve, data": ("retrieve --data {data}/corpus.jsonl --output {out}", "corpus.jsonl"),
    "convert, data": ("convert {data}/corpus.jsonl {out} --to jsonl", "corpus.jsonl"),
    "convert, run": ("convert {data} {out} --to rankllm --run {data}/run.trec", "run.trec"),
}


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_refused(name, link, tmp_path, capsys):
    command, replaced = OUTPUTS[name]
    data = write_folder(tmp_path / "data")
    target = data / replaced
    before, out = target.read_bytes(), target
    if link is not None:
        out = tmp_path / "out"
        link(target, out)
    assert main([word.format(data=data, out=out) for word in command.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"--output {out} would replace {target}, which is read; name another file") or len(line) == 300
    assert target.read_bytes() == before and not list(tmp_path.rglob("*.part*"))
