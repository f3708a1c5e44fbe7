"""An output that is one of the inputs, under whatever name, is refused before anything is read or written."""

import json
import os
import re

import pytest
from small_data import write_folder

from qpeft_ext.cli import main
from qpeft_ext.formats import PartialRun
from qpeft_ext.lm.loading import BASE_LM

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
    "synthesize, data": ("synthesize --data {data}/corpus.jsonl --base-model LM --output {out}", "corpus.jsonl"),
    "distill, examples": (
        "distill --teacher LM --base-model LM --train {data}/corpus.jsonl --teacher-scores {out} "
        "--output new --overwrite",
        "corpus.jsonl",
    ),
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
    assert re.search(r"--(output|teacher-scores) \S+ would replace .*, which is read; name another file$", line)
    assert target.read_bytes() == before and not list(tmp_path.rglob("*.part*"))


@pytest.mark.parametrize("content", ['[{"question": "why"}]', '{"settings": 3}', "{", ""])
def test_the_settings_beside_an_output_replace_no_other_file(tmp_path, content):
    """``qpeft rerank --data nq.json --output nq`` wrote its settings over the data."""
    data, output = tmp_path / "nq.json", tmp_path / "nq"
    data.write_text(content)
    for resume in (True, False):
        with pytest.raises(
            ValueError, match=r"settings of .*nq are written beside it, and would replace .*nq\.json, w"
        ):
            PartialRun(output, {"q": [("d", 1.0)]}, {"top": 1}, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["nq.json"] and data.read_text() == content


def test_the_settings_of_an_earlier_output_are_replaced(tmp_path):
    for top in (1, 2):
        partial = PartialRun(tmp_path / "nq", {"q": [("d", 1.0)]}, {"top": top})
        partial.add({"q": [("d", 1.0)]})
        partial.finish()
        assert json.loads((tmp_path / "nq.json").read_text())["settings"] == {"top": top}


def test_data_beside_an_output_of_its_name_stay(tmp_path, capsys):
    context = {"id": "1", "title": "", "text": "cats purr", "score": 1.0, "has_answer": True}
    data = tmp_path / "data" / "nq.json"
    data.parent.mkdir()
    data.write_text(json.dumps([{"question": "what purrs", "answers": ["cats"], "ctxs": [context]}]))
    before = data.read_bytes()
    options = ["--upr", "--base-model", str(BASE_LM), "--data", str(data), "--output", str(data.parent / "nq")]
    assert main(["rerank", *options]) == 2
    assert "nq.json, which holds something else; name another output" in capsys.readouterr().err
    assert data.read_bytes() == before and list(data.parent.iterdir()) == [data]
