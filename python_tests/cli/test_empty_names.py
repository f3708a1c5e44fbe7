"""An empty name is an error: otherwise another model would run, or a file go to the folder that this runs in."""

import pytest
from small_data import write_folder

from qpeft_ext.cli import main


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["rerank", "--model", "", "--base-model", "LM", "--upr", "--output", "out", "--data"], "--model"),
        (["rerank", "--model", "ADAPTER", "--base-model", " ", "--output", "out", "--data"], "--base-model"),
        (["index", "--model", "", "--base-model", "LM", "--out", "out"], "--model"),
        (["index", "--base-model", "LM", "--out", ""], "--out"),
        (["train", "--base-model", "LM", "--output", "", "--data"], "--output"),
        (["train", "--base-model", "LM", "--output=", "--data"], "--output"),
        (["train", "--base-model", "LM", "--output", "out", "--index", "", "--data"], "--index"),
        (["distill", "--teacher", "T", "--base-model", "LM", "--output", "", "--data"], "--output"),
        (["distill", "--teacher", "", "--base-model", "LM", "--output", "out", "--data"], "--teacher"),
        (["distill", "--teacher", "T", "--base-model", "LM", "--output", "out", "--teacher-scores", "", "--data"],
         "--teacher-scores"),
        (["serve", "--disk-cache", ""], "--disk-cache"),
        (["demo", "--output", "", "--data"], "--output"),
    ],
)  # fmt: skip
def test_refused(command, option, tmp_path, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main([*command, str(write_folder(tmp_path / "data"))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"error: {option} is empty; give a name (is a variable of the shell unset?)")
    assert {path.name for path in (tmp_path / "here").rglob("*")} <= {"out"}  # whose lock a command takes first


def test_an_adapter_on_the_hub_is_not_calibrated(tmp_path, capsys):
    """The result would have no place, which must be known before the work."""
    data = write_folder(tmp_path / "data")
    assert main(["calibrate", "--model", "some/adapter", "--data", str(data)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("--model some/adapter is no folder, and the result is stored in the adapter's folder")
