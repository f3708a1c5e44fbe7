"""``OUTPUT.json`` always describes the OUTPUT beside it, whatever command writes over an earlier one."""

import contextlib
import gzip
import json
import os

import pytest
from small_data import RUN, write_folder, write_lines

from qpeft_ext import formats
from qpeft_ext.cli import main
from qpeft_ext.formats import PartialRun, jsonl
from qpeft_ext.utils.partial_file import written_with

SETTINGS = {"model": "first"}
OVER = {
    "retrieve": "retrieve --data {data} --output {out}",
    "fuse": "fuse {data}/run.trec {data}/other.trec --output {out}",
    "evaluate": "evaluate --qrels {data}/qrels/test.tsv {data}/run.trec --output {out}",
    "convert to upr": "convert {data} {out} --to upr --run {data}/run.trec",
    "convert to rankllm": "convert {data} {out} --to rankllm --run {data}/run.trec",
    "convert to dpr": "convert {data} {out} --to dpr --split train",
    "convert to jsonl": "convert {data} {out} --to jsonl --split train",
}


def rerank(out, settings=SETTINGS):
    """What ``qpeft rerank`` leaves: a run with its settings."""
    partial = PartialRun(out, RUN, settings)
    with contextlib.closing(partial):
        for query_id in RUN:
            partial.add({query_id: RUN[query_id]})
        partial.finish()


@pytest.mark.parametrize("name", ["out", "out.gz"])
@pytest.mark.parametrize("command", OVER)
def test_settings_of_an_earlier_result_go(command, name, tmp_path, capsys):
    data, out = write_folder(tmp_path / "data"), tmp_path / name
    (data / "other.trec").write_bytes((data / "run.trec").read_bytes())
    words = [word.format(data=data, out=out) for word in OVER[command].split()]
    assert main(words) == 0, capsys.readouterr().err
    expected = out.read_bytes()

    rerank(out)
    assert written_with(out, SETTINGS) == "" and out.read_bytes() != expected
    assert main(words) == 0, capsys.readouterr().err
    assert out.read_bytes() == expected
    assert {path.name for path in tmp_path.iterdir()} <= {"cache", "data", name}


@pytest.mark.parametrize("content", ['{"settings": 3}', "[]", "no JSON", '{"scores": {}}'])
def test_other_files_of_that_name_stay(content, tmp_path):
    (tmp_path / "run.json").write_text(content)
    formats.write_run(tmp_path / "run", RUN)
    assert (tmp_path / "run.json").read_text() == content


def test_settings_stay_beside_a_run_that_could_not_be_replaced(tmp_path):
    rerank(tmp_path / "run")
    before = (tmp_path / "run").read_bytes()
    with pytest.raises(ValueError, match="scores must be finite"):
        formats.write_run(tmp_path / "run", {"q": [("d", float("nan"))]})
    assert (tmp_path / "run").read_bytes() == before and written_with(tmp_path / "run", SETTINGS) == ""


@pytest.mark.parametrize("name", ["run", "run.gz"])
def test_killed_between_the_settings_and_the_result(name, tmp_path, monkeypatch):
    """The earlier result does not stay beside settings that are not its own; the job goes on to its end."""
    out, other = tmp_path / name, {"model": "second"}
    rerank(out)
    replace = os.replace

    def killed(source, target):
        if os.fspath(target) == os.fspath(out):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        rerank(out, other)
    monkeypatch.undo()
    assert written_with(out, other) == "was made with unknown settings"

    partial = PartialRun(out, RUN, other)
    assert partial.num_resumed == len(RUN)
    partial.finish()
    assert written_with(out, other) == ""
    text = gzip.decompress(out.read_bytes()) if name == "run.gz" else out.read_bytes()
    assert len(text.splitlines()) == sum(map(len, RUN.values()))
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, f"{name}.json"]


def test_a_training_set_over_another(tmp_path):
    """It has no settings until its own are there, whenever `qpeft synthesize` is killed."""
    path = write_lines(tmp_path / "train.jsonl", ['{"query": "a", "positives": ["b"], "negatives": []}'])
    (tmp_path / "train.jsonl.json").write_text(json.dumps({"settings": SETTINGS}))
    assert written_with(path, SETTINGS) == ""
    assert jsonl.write_examples(path, [{"query": "c", "positives": ["d"], "negatives": []}]) == 1
    assert written_with(path, SETTINGS) == "was made with unknown settings"
