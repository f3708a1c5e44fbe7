"""A name of a model that is empty is an error: otherwise another model would run, or none."""

import pytest
from small_data import write_folder

from qpeft_ext.cli import main


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["rerank", "--model", "", "--base-model", "LM", "--upr", "--output", "out", "--data"], "--model"),
        (["rerank", "--model", "ADAPTER", "--base-model", " ", "--output", "out", "--data"], "--base-model"),
        (["index", "--model", "", "--base-model", "LM", "--out", "out"], "--model"),
    ],
)
def test_refused(command, option, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*command, str(write_folder(tmp_path / "data"))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"error: {option} is empty; give a name (is a variable of the shell unset?)")
    assert not (tmp_path / "out").exists()


def test_an_adapter_on_the_hub_is_not_calibrated(tmp_path, capsys):
    """The result would have no place, which must be known before the work."""
    data = write_folder(tmp_path / "data")
    assert main(["calibrate", "--model", "some/adapter", "--data", str(data)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("--model some/adapter is no folder, and the result is stored in the adapter's folder")
