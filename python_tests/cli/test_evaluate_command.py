"""`qpeft evaluate`, and options that take several values."""

import json
import re

import pytest
from cli.in_process import run_command
from small_data import RUN, write_folder

from qpeft_ext import formats
from qpeft_ext.cli import main
from qpeft_ext.evaluation import evaluate


def test_evaluate(tmp_path, capsys):
    data = write_folder(tmp_path / "data", ".gz")
    better = {
        q: sorted(ranking, key=lambda c: c[0] != {"q1": "d1", "q2": "d3", "q3": "d2"}[q]) for q, ranking in RUN.items()
    }
    better = {q: [(d, -float(i)) for i, (d, _) in enumerate(ranking)] for q, ranking in better.items()}
    formats.write_run(tmp_path / "better.trec", better)
    out = run_command(
        capsys,
        "evaluate",
        "--qrels",
        data / "qrels" / "test.tsv.gz",
        data / "run.trec.gz",
        tmp_path / "better.trec",
        "--measures",
        "nDCG@10",
        "RR@10",
        "--output",
        tmp_path / "table.json",
    )
    assert re.search(r"run +│ +0\.7\d{3} │ +0\.6667", out) and re.search(r"better +│ +1\.0000 │ +1\.0000", out)
    assert "3 queries; difference to run and two-sided p-value, paired t-test" in out
    table = json.loads((tmp_path / "table.json").read_text())
    assert [system["name"] for system in table["systems"]] == ["run", "better"]
    assert table["systems"][1]["difference"]["RR@10"] == pytest.approx(1 / 3)


def test_a_table_that_is_wider_than_the_screen_is_whole(tmp_path, capsys):
    """No number and no name is cut, as they would be to fit 100 columns."""
    data = write_folder(tmp_path / "data")
    label = "a-run-with-a-name-of-" + "many-letters-" * 8
    formats.write_run(tmp_path / f"{label}.trec", RUN)
    names = [f"{name}@{k}" for name in ("nDCG", "Success") for k in (1, 2, 3, 5, 10, 20, 50, 100)]
    runs = [data / "run.trec", tmp_path / f"{label}.trec"]
    out = run_command(capsys, "evaluate", "--qrels", data, *runs, "--measures", *names)
    lines = [line.replace("┃", "│") for line in out.splitlines() if line[:1] in ("│", "┃")]
    head, first, *rest = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    means = evaluate(RUN, formats.read_qrels(data / "qrels" / "test.tsv"), names).means
    assert head == ["system", *names]
    assert first == ["run", *(f"{means[name]:.4f}" for name in names)]
    assert [label, *first[1:]] in rest and rest[-1] == ["", *["p=1.000"] * len(names)] and "…" not in out


@pytest.mark.parametrize(
    "arguments, columns",
    [
        ("bm25.trec --measures nDCG@10 MAP AP@100", ["nDCG@10", "MAP", "AP@100"]),
        ("--measures MAP RR@10 bm25.trec P@1", ["MAP", "RR@10", "P@1"]),
        ("RR --measures nDCG@10", ["nDCG@10"]),  # before --measures it is a file
        ("bm25.trec --measures MAP,RR P@1 --ties order", ["MAP", "RR", "P@1"]),
        ("bm25.trec --measures nDCG@10 ./RR --measures MAP", ["nDCG@10", "MAP"]),
    ],
)
def test_measures_are_no_runs(arguments, columns, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write_folder(tmp_path / "data")
    formats.write_run("bm25.trec", RUN)
    formats.write_run("RR", RUN)
    run_command(capsys, "evaluate", "--qrels", data / "qrels" / "test.tsv", *arguments.split(), "--output", "table")
    table = json.loads((tmp_path / "table").read_text())
    assert table["measures"] == columns and len(table["systems"]) == 1 + ("./RR" in arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("evaluate --qrels q bm25.trec --measures nDCG@10 RR", "RR is a measure and also a file here; write ./RR for"),
        ("evaluate --qrels q MAP bm25.trec", "MAP is a measure and no file; name it directly after --measures"),
        (
            "evaluate --qrels q bm25.trec --measures nDCG@10 ndgc",
            "ndgc is neither a run file nor a measure; did you mean",
        ),
        (
            "evaluate --qrels q bm25.trec --measures nDCG@10 mrr@10",
            "mrr@10 is neither a run file nor a measure; did you",
        ),
        ("retrieve --data d --output o --measures MAP ndgc", "(ndgc); --measures takes one value: repeat it"),
        ("train --base-model m --output o --option a=1 b=2", "(b=2); --option takes one value: repeat it"),
        ("fuse RR bm25.trec --method scores --dev-run RR bm25.trec --dev-qrels q --output o", "write --dev-run before"),
    ],
)
def test_options_that_could_swallow_arguments(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    formats.write_run("bm25.trec", RUN)
    formats.write_run("RR", RUN)
    assert main(arguments.split()) == 2
    assert message in capsys.readouterr().err
