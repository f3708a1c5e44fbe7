"""``qpeft calibrate``: what it writes, and one line for what is wrong."""

import json
from pathlib import Path

import pytest

import qpeft_ext as qpeft
from qpeft_ext.cli import main

BASE_LM = Path(qpeft.__file__).parent / "demo" / "base_lm"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A BEIR folder of six queries: each document answers the query of its number, and a few have two."""
    folder = tmp_path_factory.mktemp("data")
    words = ["list", "file", "string", "number", "folder", "date"]
    texts = [f"def read_{word}(path): return parse_{word}(open(path).read())" for word in words]
    lines = [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [{"_id": f"q{i}", "text": f"Read a {word} from a path"} for i, word in enumerate(words)]
    (folder / "queries.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "qrels").mkdir()
    rows = [f"q{i}\td{i}\t1" for i in range(6)] + ["q0\td3\t1", "q1\td2\t1"]
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(rows) + "\n")
    run = [f"q{q} Q0 d{(q + place) % 6} {place + 1} {-place} bm25" for q in range(6) for place in range(6)]
    (folder / "run.trec").write_text("\n".join(run) + "\n")
    return folder


def test_a_new_adapter_without_clues_keeps_the_result(data, tmp_path, capsys):
    output = tmp_path / "calibrated"
    where = ["--data", str(data), "--run", str(data / "run.trec"), "--device", "cpu"]
    assert main(["calibrate", "--base-model", str(BASE_LM), "--output", str(output), *where]) == 0
    config = json.loads((output / "adapter_config.json").read_text())
    measured = config["calibration"]["measured"]
    assert (config["clues"], measured["queries"], measured["pairs"]) == ("none", 6, 36)
    assert "dev" in measured["data"] and "expected calibration error" in capsys.readouterr().out
    assert "reliability.svg" in (output / "README.md").read_text()
    assert main(["calibrate", "--model", str(output), *where, "--queries", "4", "--seed", "1"]) == 0
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["calibration"]["measured"]["queries"] == 4
    assert (output / "README.md").read_text().count("## Calibration") == 1


def test_an_lm_without_an_adapter_can_be_asked(data, tmp_path, capsys):
    """The packaged LM has no token for yes, so that the question itself is refused."""
    where = ["--data", str(data), "--run", str(data / "run.trec"), "--device", "cpu"]
    asked = ["calibrate", "--base-model", str(BASE_LM), "--output", str(tmp_path / "a"), *where, "--score", "yes_no"]
    assert main(asked) == 2 and not (tmp_path / "a").exists()
    assert "yes_words: 'yes' must be a single token of the LM's tokenizer, got 'y', 'es'" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "reason"), [
    ([], "expected --model ADAPTER, or --base-model LM with --output FOLDER"),
    (["--model", "a", "--output", "b"], "expected --model ADAPTER, or --base-model LM with --output FOLDER"),
    (["--output", "b"], "expected --base-model LM"),
    (["--base-model", "LM", "--output", "."], "--output . is there already"),
    (["--model", "a", "--template", "upr"], "--template is for --base-model"),
    (["--model", "a", "--score", "graded"], "--score is for --base-model without an adapter"),
    (["--model", "a", "--queries", "1"], "--queries must be at least 2"),
    (["--base-model", "LM", "--output", "b", "--split", "tset"], "has no split 'tset'"),
])  # fmt: skip
def test_wrong_options_are_one_line(data, options, reason, monkeypatch, capsys):
    monkeypatch.chdir(data)
    assert main(["calibrate", "--data", str(data), *options]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1
