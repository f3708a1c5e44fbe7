"""Bad input, one row each: exit code 2, exactly one line on stderr with the key facts, nothing left behind."""

import re

import pytest
from cli.bad_rows import EVALUATE, RERANK, ROWS, TRAINING, UPR
from jobs.tiny_job import save_lm
from small_data import write_lines

from qpeft_ext import formats
from qpeft_ext.cli import main


def arguments(command, job, out):
    return [word.format(job=job, out=out) for word in command.split(" ")]


def everything_in(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ROWS)
def test_bad_input(name, job, tmp_path, capfd, monkeypatch):
    damage, command, facts = ROWS[name]
    damage(job)
    if name == "cache that cannot be made":
        monkeypatch.setenv("QPEFT_CACHE", str(job / "data" / "run.trec" / "cache"))
    before = everything_in(job)

    code = main(arguments(command, job, tmp_path / "out"))

    stderr = capfd.readouterr().err
    assert code == 2, stderr
    assert re.fullmatch(r"qpeft( \w+)?: error: [^\n]+\n", stderr), stderr
    assert "Traceback" not in stderr and len(stderr) <= 301
    for fact in facts:
        assert fact in stderr, stderr
    assert everything_in(job) == before, "input was changed, or something was left in its folders"
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"job", "cache"} and not list((tmp_path / "cache").glob("*.tmp"))


@pytest.mark.parametrize("command", [RERANK, UPR, EVALUATE])
def test_the_undamaged_job_runs(command, job, tmp_path, capfd):
    """Otherwise a row above could fail for another reason than its own."""
    assert main(arguments(command, job, tmp_path / "out")) == 0
    assert (tmp_path / "out").is_file() and capfd.readouterr().err == ""


def test_there_are_enough_rows():
    assert len(ROWS) >= 25


def test_an_lm_of_another_size(job, tmp_path, capfd):
    save_lm(tmp_path / "wide", family="gpt2")
    assert main(arguments(RERANK + f" --base-model {tmp_path}/wide", job, tmp_path / "out")) == 2
    assert "trained on an LM with model_type llama, this one has gpt2" in capfd.readouterr().err


def test_training_examples_say_what_they_leave_out(job, capsys):
    """Not an error, but never silent."""
    write_lines(job / TRAINING, ["query-id\tcorpus-id\tscore", "q1\td1\t1", "q1\tgone\t1", "q2\td3\t0"])
    qrels = formats.beir.read_qrels(job / "data", "train")
    _, counts = formats.training_examples(formats.read_queries(job / "data"), qrels, None, formats.Corpus(job / "data"))
    assert str(counts) == (
        "1 training example; 1 query without a relevant document left out; 1 relevant document is not in the corpus"
    )
