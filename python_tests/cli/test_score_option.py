"""Scores of other kinds at the command line: train, rerank, and what does not fit."""

import json

import pytest
from jobs.tiny_job import make_job
from small_data import QUERIES

import qpeft_ext as qpeft
from qpeft_ext.cli import main

pytestmark = pytest.mark.slow

WORDS = ("--option", "yes_words=y", "--option", "no_words=n")
SMALL = ("--rank", 8, "--generated-lora-rank", 2)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return make_job(tmp_path_factory.mktemp("job"))


def train(job, output, *options) -> int:
    where = ("train", "--base-model", job / "lm", "--output", output, "--data", job / "data", "--device", "cpu")
    return main([str(x) for x in (*where, "--max-steps", 2, *options)])


def rerank(job, model, output, *options) -> int:
    where = ("rerank", "--data", job / "data", "--run", job / "data" / "run.trec", "--model", model, "--device", "cpu")
    return main([str(x) for x in (*where, "--output", output, *options)])


def test_yes_or_no_from_training_to_a_run(job, tmp_path, capsys):
    assert train(job, tmp_path / "adapter", *SMALL, "--score", "yes_no", "--loss", "binary_cross_entropy", *WORDS) == 0
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["score"], config["yes_words"], config["loss"]) == ("yes_no", ["y"], "binary_cross_entropy")
    assert "the log-odds with which" in (tmp_path / "adapter" / "README.md").read_text()
    assert rerank(job, tmp_path / "adapter", tmp_path / "run.trec") == 0
    assert rerank(job, tmp_path / "adapter", tmp_path / "relevant.trec", "--threshold", 0.5) == 0
    every, kept = ((tmp_path / name).read_text().splitlines() for name in ("run.trec", "relevant.trec"))
    positive = [line for line in every if float(line.split()[4]) >= 0]  # the logistic of log-odds is half at 0
    assert [line.split()[:3] for line in kept] == [line.split()[:3] for line in positive]
    reranker = qpeft.Reranker.from_pretrained(tmp_path / "adapter")
    assert "score yes_no" in repr(reranker) and len(reranker.rank(QUERIES["q1"], ["sea", "moon"])) == 2


def test_the_weight_of_both_needs_no_clues(job, tmp_path, capsys):
    assert train(job, tmp_path / "adapter", "--clues", "none", "--score", "both", *WORDS) == 0
    assert "1 of " in capsys.readouterr().out


@pytest.mark.parametrize(("options", "reason"), [
    (("--score", "yes_no"), "yes_words: 'yes' must be a single token of the LM's tokenizer, got 'y', 'e', 's'"),
    (("--score", "yes_no", "--loss", "pointwise"), "loss='pointwise' makes queries likely"),
    (("--score", "graded", "--option", "max_grade=12"), "max_grade: '10' must be a single token"),
    (("--score", "yes_no", "--option", "yes_words=y", "--option", "no_words=y,n"), "yes_words and no_words both have"),
    (("--score", "yesno"), "did you mean 'yes_no'?"),
])  # fmt: skip
def test_wrong_scores_are_one_line(job, tmp_path, capsys, options, reason):
    assert train(job, tmp_path / "adapter", *options) == 2
    error = capsys.readouterr().err
    assert reason in error and error.rstrip().count("\n") <= 1
    assert not (tmp_path / "adapter" / "adapter_config.json").exists()
