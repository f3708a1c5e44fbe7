"""The command line as a whole: help, version, info, interruptions, exit codes."""

import os
import subprocess
import sys

import pytest
from cli.in_process import run_command
from jobs.tiny_job import make_job

import qpeft_ext as qpeft
from qpeft_ext.cli import main

COMMANDS = [
    "info",
    "retrieve",
    "synthesize",
    "train",
    "calibrate",
    "index",
    "rerank",
    "evaluate",
    "fuse",
    "convert",
    "demo",
]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return make_job(tmp_path_factory.mktemp("job"))


def test_what_needs_no_model_is_quick_because_torch_waits(tmp_path):
    (tmp_path / "run").write_text("q1 Q0 d1 1 2.0 t\n")
    (tmp_path / "qrels").write_text("q1 0 d1 1\n")
    program = """
import sys
from qpeft_ext.cli import main
folder, heavy = sys.argv[1], {"torch", "transformers", "matplotlib", "bm25s"}
main(["--help"])
print(heavy & set(sys.modules) or "nothing", {"scipy", "ir_measures"} & set(sys.modules) or "nothing")
for command in (["evaluate", "--qrels", f"{folder}/qrels", f"{folder}/run", "--measures", "nDCG@10"],
                ["fuse", f"{folder}/run", f"{folder}/run", "--output", f"{folder}/fused"]):
    print(command[0], main(command), heavy & set(sys.modules) or "nothing")
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)
    for line in ("nothing nothing", "evaluate 0 nothing", "fuse 0 nothing"):
        assert line in done.stdout.splitlines(), done.stdout + done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(command, capsys):
    assert f"Usage: qpeft {command}" in run_command(capsys, command, "--help")


def test_version_and_no_arguments(capsys):
    assert run_command(capsys, "--version").strip() == qpeft.__version__
    out = run_command(capsys)
    assert "Commands:" in out
    assert "..." not in out.partition("Commands:")[2], "a summary is cut"


def test_info(capsys):
    out = run_command(capsys, "info")
    for expected in ("qpeft_ext", qpeft.__version__, "torch", "threads", "cpu", "cuda", "live", "compiler"):
        assert expected in out


def test_interrupted(job, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("qpeft_ext.ranking.systems.Systems.__call__", interrupt)
    code = main(
        [
            "rerank",
            "--model",
            str(job / "adapter"),
            "--data",
            str(job / "data"),
            "--run",
            str(job / "data" / "run.trec"),
            "--output",
            str(tmp_path / "out.trec"),
        ]
    )
    assert code == 130 and capsys.readouterr().err == "qpeft rerank: error: interrupted\n"
    assert not [file for file in tmp_path.iterdir() if file.name != "cache"]


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("QPEFT_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["evaluate", "--qrels", "missing", "run"])


@pytest.mark.parametrize(("text", "users"), [
    ("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried", True), ("std::bad_alloc", True),
    ("could not create a primitive descriptor", False), ("mat1 and mat2 shapes cannot be multiplied", False),
])  # fmt: skip
def test_a_lack_of_memory_of_the_host_is_one_line(monkeypatch, capsys, text, users):
    """torch has no type for it. What oneDNN refuses may have any reason, and is shown with its traceback."""

    def fail(arguments):
        raise RuntimeError(text)

    monkeypatch.setattr("qpeft_ext.cli.app.spread_measures", fail)
    if users:
        assert main(["info"]) == 2
        assert capsys.readouterr().err == f"qpeft info: error: not enough memory ({text})\n"
    else:
        with pytest.raises(RuntimeError, match=text):
            main(["info"])


@pytest.mark.slow
def test_as_a_process(tmp_path):
    """Exit code and stderr as the shell sees them."""
    (tmp_path / "run").write_text("q1 Q0 d1 1 1.0 t\n")
    done = subprocess.run(
        [sys.executable, "-m", "qpeft_ext.cli", "evaluate", "--qrels", "missing.tsv", "run"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(qpeft.__file__))},
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "qpeft evaluate: error: missing.tsv: no such file; expected qrels\n"
