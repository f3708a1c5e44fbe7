"""Options of `qpeft train` and `qpeft distill`: those that would do nothing, or cannot work, are errors in one line."""

import json
import re

import pytest
from jobs.tiny_job import make_job

from qpeft_ext.cli import main

EXAMPLE = {"query": "tides", "positives": ["the sea"], "negatives": ["a note"]}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    job = make_job(tmp_path_factory.mktemp("job"))
    (job / "train.jsonl").write_text(f"{json.dumps(EXAMPLE)}\n" * 4)
    return job


def refused(capsys, job, output, command, *options) -> str:
    """The one line that a command ends with."""
    places = ["--base-model", job / "lm", "--output", output, "--device", "cpu"]
    assert main([str(option) for option in (command, *places, *options)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and len(error) < 300 and not (output / "adapter_config.json").exists()
    return error


@pytest.mark.parametrize("command", ["train", "distill --teacher LM"])
@pytest.mark.parametrize(
    "option, message",
    [
        ("--run run.trec", "--run is of --data with qrels and does nothing with --train, whose examples have their"),
        ("--depth 10", "--depth is of --data with qrels"),
        ("--split dev", "--split is of --data with qrels"),
        ("--ignore-identical-ids", "--ignore-identical-ids is of --data with qrels"),
    ],
)
def test_options_of_qrels_with_examples(job, tmp_path, capsys, command, option, message):
    given = [*command.split()[1:], "--train", job / "train.jsonl", *option.split()]
    assert message in refused(capsys, job, tmp_path / "adapter", command.split()[0], *given)


def test_a_run_with_a_data_set_that_has_examples(job, tmp_path, capsys):
    given = ["--data", job / "train.jsonl", "--run", job / "data" / "run.trec"]
    message = "--run is of --data with qrels and does nothing with .*train.jsonl, whose examples have their negatives"
    assert re.search(message, refused(capsys, job, tmp_path / "adapter", "train", *given))


@pytest.mark.parametrize(
    "options, message",
    [
        ("--margin 0.5", "--margin 0.5 is of --loss pairwise and pointwise_pairwise and does nothing with listwise"),
        ("--margin 0.5 --loss pairwise --option loss=ranknet", "does nothing with ranknet"),
        ("--report-to nonsense", "--report-to nonsense: nonsense is not supported"),
    ],
)
def test_options_without_effect(job, tmp_path, capsys, options, message):
    given = ["--train", job / "train.jsonl", *options.split()]
    assert message in refused(capsys, job, tmp_path / "adapter", "train", *given)


def test_a_reporter_that_is_not_installed(job, tmp_path, capsys, monkeypatch):
    import transformers.integrations.integration_utils as module

    def missing():
        raise RuntimeError("Mine requires mine to be installed.\nRun pip install mine.")

    monkeypatch.setitem(module.INTEGRATION_TO_CALLBACK, "mine", missing)
    error = refused(capsys, job, tmp_path / "adapter", "train", "--train", job / "train.jsonl", "--report-to", "mine")
    assert "--report-to mine: Mine requires mine to be installed. Run pip install mine." in error


def test_a_training_that_was_killed_before_its_first_checkpoint_begins_again(job, tmp_path, capsys):
    """It leaves the folder of checkpoints, empty."""
    (tmp_path / "adapter" / "checkpoints").mkdir(parents=True)
    given = ["--base-model", job / "lm", "--train", job / "train.jsonl", "--output", tmp_path / "adapter"]
    assert main([str(option) for option in ("train", *given, "--device", "cpu", "--max-steps", 1, "--rank", 8)]) == 0
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
