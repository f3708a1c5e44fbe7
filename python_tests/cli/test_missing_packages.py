"""Commands without the optional packages that they need: one line at once, which says what to install."""

import importlib.util

import pytest

from qpeft_ext.cli import main
from qpeft_ext.training import QPeftTrainer
from qpeft_ext.utils.optional import expect_packages


@pytest.fixture
def missing(monkeypatch):
    """A function that makes modules look as if they were not installed."""
    find = importlib.util.find_spec

    def hide(*names: str) -> None:
        found = lambda name, *rest: None if name in names else find(name, *rest)  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", found)

    return hide


def test_the_line_names_all_that_is_missing(missing):
    missing("scipy", "ir_measures", "bm25s")
    extras = {"bm25s": "bm25", "ir_measures": "eval", "numpy": "plot", "scipy": "eval"}
    with pytest.raises(ImportError) as raised:
        expect_packages("the demo", extras)
    line = "the demo needs the packages bm25s, ir_measures, scipy: pip install 'qpeft_ext[bm25,eval]'"
    assert str(raised.value) == line
    expect_packages("the demo", {"numpy": "plot"})


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("accelerate", "train --base-model LM --train no.jsonl --output out", "training needs … accelerate … train"),
        ("accelerate", "demo --model packaged --output out", "the demo needs … accelerate … train"),
        ("matplotlib", "demo --model packaged --output out", "the demo needs … matplotlib … plot"),
        ("bm25s", "demo --model packaged --output out", "the demo needs … bm25s … bm25"),
        ("matplotlib", "compare nothing.yaml --output out", "qpeft compare needs … matplotlib … plot"),
    ],
)
def test_a_command_says_so_before_it_works(module, arguments, message, missing, tmp_path, monkeypatch, capsys):
    missing(module)
    monkeypatch.chdir(tmp_path)
    assert main(arguments.split()) == 2
    user, package, extra = message.split(" … ")
    error = f"error: {user} the package {package}: pip install 'qpeft_ext[{extra}]'\n"
    assert capsys.readouterr().err.endswith(error)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_the_trainer_says_so_before_it_looks_at_its_arguments(missing):
    missing("accelerate")
    with pytest.raises(ImportError, match=r"^QPeftTrainer needs .* accelerate: pip install 'qpeft_ext\[train\]'$"):
        QPeftTrainer(model=None)
