"""Numbers that nothing can be done with, given to any option that takes one: one line that names the option."""

import re
from typing import get_args, get_type_hints

import pytest
from small_data import write_folder
from typer.main import get_command

from qpeft_ext.cli import main
from qpeft_ext.cli.app import app

COMMANDS = get_command(app).commands
HINTS = {command.callback.__module__.rpartition(".")[2]: get_type_hints(command.callback)
         for command in app.registered_commands}  # fmt: skip
WHOLE = [
    (name, option.opts[0])
    for name, command in COMMANDS.items()
    for option in command.params
    if int in ((hint := HINTS[name].get(option.name)), *get_args(hint))
]


def required(name):
    """What a command needs so that its options are read."""
    flags = [option.opts[0] for option in COMMANDS[name].params if option.required]
    return [word for flag in flags for word in ([flag, "x"] if flag.startswith("--") else ["x"])]


def test_there_are_such_options():
    assert len(WHOLE) > 50 and ("fuse", "--k") in WHOLE and ("train", "--seed") in WHOLE


@pytest.mark.parametrize("name, option", WHOLE)
@pytest.mark.parametrize("sign, bound", [("", "at most 9223372036854775807"), ("-", "at least -9223372036854775807")])
def test_whole_numbers_of_400_digits(name, option, sign, bound, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([name, *required(name), f"{option}={sign}{'9' * 400}"]) == 2
    assert re.fullmatch(f"qpeft {name}: error: {option} must be {bound}, got {sign}9+…\n", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command, fact",
    [
        ("fuse {run} {run2} --k 2147483648", "k must be from 0 to 2147483647, got 2147483648"),
        ("fuse {run} {run2} --k -1", "k must be from 0 to 2147483647, got -1"),
        ("fuse {run} {run2} --method scores --weights 1e400,1", "expected one finite weight per run"),
        ("fuse {run} {run2} --method scores --weights one,1", "--weights: expected numbers with commas"),
        ("retrieve --data {data} --k1 1e308", "k1 must be from 0 to 1,000,000 and b from 0 to 1, got 1e+308 and 0.4"),
        ("retrieve --data {data} --b=-1e-300", "b from 0 to 1, got 0.9 and -1e-300"),
        ("rerank --data {data} --base-model x --upr --max-memory 2²", "must be a number of bytes or free, got '2²'"),
        ("rerank --data {data} --base-model x --upr --max-memory 9{zeros}", "must be a number of bytes or free, got"),
        ("train --data {data} --base-model x --epochs 1e308", "--epochs must be at most 1,000,000, got 1e+308"),
        ("train --data {data} --base-model x --seed -1", "--seed must be from 0 to 4294967295, got -1"),
        ("distill --data {data} --teacher x --base-model x --seed 4294967296", "--seed must be from 0 to 4294967295"),
        ("rerank --data {data} --base-model x --upr --threshold nan", "--threshold must be in [0, 1], got nan"),
    ],
)
def test_numbers_out_of_range(command, fact, capsys, tmp_path):
    data = write_folder(tmp_path / "data")
    (data / "run2.trec").write_bytes((data / "run.trec").read_bytes())
    words = {"run": data / "run.trec", "run2": data / "run2.trec", "data": data, "zeros": "0" * 5000}
    assert main([*(word.format_map(words) for word in command.split()), "--output", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert fact in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
