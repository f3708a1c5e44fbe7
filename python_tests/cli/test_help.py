"""The help of every command: its options in groups, each of them once."""

import re

import pytest
from typer.main import get_command

from qpeft_ext.cli import main
from qpeft_ext.cli.app import app
from qpeft_ext.cli.sections import SECTIONS

COMMANDS = get_command(app).commands
MANY = 20  # options that nobody reads as one list


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_there_once_with_a_text(name, capsys):
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out.partition("\nOptions:\n")[2]
    shown = re.findall(r"^  (--[\w-]+)(?:,| /)?.*$", text, re.M)
    assert sorted(shown) == sorted([*(p.opts[0] for p in COMMANDS[name].params if p.opts[0][:2] == "--"), "--help"])
    assert all(p.help for p in COMMANDS[name].params)
    assert "  --help" in text.partition("\n\n")[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_many_options_are_in_groups(name, capsys):
    assert main([name, "--help"]) == 0
    titles = re.findall(r"^(\S.*):$", capsys.readouterr().out, re.M)
    options = [p.name for p in COMMANDS[name].params]
    sections = SECTIONS.get(name, {})
    assert len(options) <= MANY or sections
    assert titles == ["Arguments"] * (titles[0] == "Arguments") + ["Options", *sections.values()]
    assert [option for option in options if option in sections] == list(sections)
