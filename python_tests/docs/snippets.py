"""Find the fenced code blocks of a Markdown page and run them; `test_snippets.py` says what the convention is."""

from __future__ import annotations

import ast
import contextlib
import doctest
import io
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON, SHELL, OUTPUT = ("python", "pycon"), ("sh", "bash", "console"), "text"
FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,}) *(?P<language>[\w-]*)")
FILE = re.compile(r"^\s*<!-- file: ([\w.-]+) -->\s*$")
NOT_RUN = re.compile(r"^\s*<!-- not run: (.*\S) -->\s*$")
NEEDS = re.compile(r"^\s*<!-- needs: ([\w.]+) -->\s*$")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


@dataclass
class Block:
    """A fenced block of code, or of a ``file``. ``line`` is that of its first line of code, counted from 1."""

    page: str
    line: int
    language: str
    text: str
    not_run: str | None = None
    file: str | None = None
    needs: str | None = None  # a module without which it does not run
    output: str | None = None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read_blocks(path: Path) -> list[Block]:
    """The blocks of ``path`` in Python or shell, each with the output block that follows it directly, and files."""
    lines = path.read_text(encoding="utf-8").splitlines()
    page = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    blocks: list[Block] = []
    place, above, last = 0, "", None  # `last`: the block that a block right here would be the output of
    while place < len(lines):
        opening = FENCE.match(lines[place])
        if not opening:
            if lines[place].strip():
                above, last = lines[place], None
            place += 1
            continue
        indent, fence = len(opening["indent"]), opening["fence"]
        end = next(i for i in range(place + 1, len(lines)) if lines[i].strip().startswith(fence))
        text = "\n".join(line[indent:] for line in lines[place + 1 : end])
        reason, file, needs = NOT_RUN.match(above), FILE.match(above), NEEDS.match(above)
        if file or opening["language"] in PYTHON + SHELL:
            last = Block(page, place + 2, opening["language"], text)
            last.not_run, last.file, last.needs = (found and found[1] for found in (reason, file, needs))
            blocks.append(last)
        else:
            if opening["language"] == OUTPUT and last:
                last.output = text
            last = None
        above, place = "", end + 1
    return blocks


@cache
def options_of_commands() -> dict[str, set[str]]:
    """Names of the options of every command of ``qpeft``."""
    from typer.main import get_command

    from qpeft_ext.cli.app import app

    commands = get_command(app).commands
    return {
        name: {"--help"}.union(*(option.opts + option.secondary_opts for option in command.params))
        for name, command in commands.items()
    }


@dataclass
class Command:
    """One command of a shell block: ``variables`` before it, its words, and the line as written."""

    line: str
    words: list[str]
    variables: dict[str, str] = field(default_factory=dict)
    expected: list[str] = field(default_factory=list)  # lines of output below it, in a console block


def read_commands(block: Block) -> Iterator[Command]:
    """The commands of a shell block. Raises: ValueError for a quote that is not closed."""
    lines = block.text.replace("\\\n", " ").splitlines()
    found: list[Command] = []
    for line in lines:
        if block.language == "console" and not line.startswith("$ "):
            found[-1].expected.append(line)
            continue
        words = shlex.split(line.removeprefix("$ "), comments=True)
        variables = {}
        while words and re.match(r"[A-Z_]+=", words[0]):
            name, _, variables_value = words.pop(0).partition("=")
            variables[name] = variables_value
        if words or variables:
            found.append(Command(line.removeprefix("$ "), words, variables))
    yield from found


def qpeft_arguments(words: list[str]) -> list[str] | None:
    """Arguments of the command ``qpeft``, however it is started; None for other commands."""
    if words[:1] == ["qpeft"]:
        return words[1:]
    if words[:1] in (["python"], ["torchrun"]) and "qpeft_ext.cli" in words:
        return words[words.index("qpeft_ext.cli") + 1 :]
    return None


def check_command(command: Command) -> None:
    """Without running it: the command, its options, its targets and the files that it names exist."""
    words = command.words
    if (arguments := qpeft_arguments(words)) is not None:
        name = next((word for word in arguments if not word.startswith("-")), None)
        known = {"--version", "--help"} if name is None else options_of_commands().get(name)
        assert known is not None, f"qpeft has no command {name}: {command.line}"
        for option in re.findall(r"(?<!\S)--?[a-z][\w-]*", " ".join(arguments)):
            assert option in known, f"qpeft {name} has no option {option}: {command.line}"
    elif words[:1] == ["make"]:
        _check_make(words[1:], command.line)
    elif words[:2] == ["pip", "install"]:
        _check_pip(words[2:], command.line)
    elif words[:1] in (["python"], ["torchrun"]):
        _check_script(words, command.line)


def _check_make(words: list[str], line: str) -> None:
    text = (ROOT / "Makefile").read_text()
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            assert re.search(rf"^{re.escape(word)}:", text, re.M), f"the Makefile has no target {word}: {line}"
        else:
            assert re.search(rf"\b{name}\b", text), f"the Makefile has no variable {name}: {line}"
            assert name != "TESTS" or (ROOT / value.partition("::")[0]).exists(), f"{value} does not exist: {line}"


def _check_pip(words: list[str], line: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"\[(.*?)\]", " ".join(words)):
        unknown = set(extras.split(",")) - set(project["optional-dependencies"])
        assert not unknown, f"pyproject.toml has no extra {', '.join(unknown)}: {line}"


def _check_script(words: list[str], line: str) -> None:
    script = next((word for word in words if word.endswith(".py")), None)
    if script is None or not script.startswith(("benchmarks/", "python_tests/", ".ci/")):
        return
    path = ROOT / script
    assert path.is_file(), f"{script} does not exist: {line}"
    sources = path.read_text() + (ROOT / "benchmarks" / "common.py").read_text()
    for word in words:
        option = word.partition("=")[0]
        assert not option.startswith("--") or f'"{option}"' in sources, f"{script} has no option {option}: {line}"


class Page:
    """Runs the blocks of one page in the current folder. ``names``: those of Python, which its blocks share."""

    def __init__(self, names: dict) -> None:
        self.names = names

    def run(self, block: Block) -> None:
        """Run ``block`` and compare what it prints. Raises: AssertionError that names page and line."""
        try:
            if block.file:
                Path(block.file).write_text(block.text + "\n")
                return
            if block.language in PYTHON:
                printed = self._python(block)
                if block.output is not None:
                    compare(block.output, printed)
                return
            printed = "".join(self._command(command, block.output) for command in read_commands(block))
            if block.output is not None:
                compare(block.output, printed)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            raise AssertionError(f"{block}: {type(error).__name__}: {error}") from error

    def _python(self, block: Block) -> str:
        """What the code prints; of a last line that is an expression also the value, as at Python's prompt."""
        if block.language == "pycon" or block.text.lstrip().startswith(">>>"):
            return self._examples(block)
        tree = ast.parse(block.text, str(block))
        ast.increment_lineno(tree, block.line - 1)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, block.page, "exec"), self.names)
            if last is not None:
                value = eval(compile(ast.Expression(last.value), block.page, "eval"), self.names)
                if value is not None:
                    print(repr(value))
        return printed.getvalue()

    def _examples(self, block: Block) -> str:
        text = block.text.replace("…", "...") + "\n"
        test = doctest.DocTestParser().get_doctest(text, {}, str(block), block.page, block.line - 1)
        test.globs = self.names
        report = io.StringIO()
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, verbose=False)
        runner.run(test, out=report.write, clear_globs=False)
        assert not runner.failures, report.getvalue()
        return ""

    def _command(self, command: Command, output: str | None) -> str:
        """What a command prints; "" for those that are only looked at."""
        check_command(command)
        if not command.words or command.words[0] == "export":
            return ""
        arguments = qpeft_arguments(command.words)
        if command.words[0] in ("make", "pip") or arguments is None and command.words[0] == "python":
            return ""
        with _environment(command.variables):
            if arguments is None or set(command.words) & {"|", ">", "<", "&&", ";"}:
                printed = _run_by_shell(command)
            else:
                printed = _run_qpeft(arguments, error="error:" in (output or "\n".join(command.expected)))
        if command.expected:
            compare("\n".join(command.expected), printed)
        return printed


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run_qpeft(arguments: list[str], error: bool) -> str:
    """In this process, which has torch imported already. ``error``: the page shows an error, which is then expected."""
    from qpeft_ext.cli import main

    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        code = main(arguments)
    assert code == (2 if error else 0), f"exit code {code}: {printed.getvalue()}{errors.getvalue()}"
    return printed.getvalue() + (errors.getvalue() if error else "")


SMALL_TOOLS = {"cat", "cp", "cut", "grep", "head", "ls", "mkdir", "rm", "sed", "sort", "tail", "wc", "zcat"}


def _run_by_shell(command: Command) -> str:
    assert command.words[0] in SMALL_TOOLS, f"this test does not know the command {command.words[0]}: {command.line}"
    done = subprocess.run(["bash", "-c", command.line], capture_output=True, text=True)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr}"
    return done.stdout


def compare(expected: str, printed: str) -> None:
    """``…`` stands for anything, blanks count as one, and a fraction may differ by one in its last digit.

    Raises: AssertionError that shows both.
    """
    expected, printed = " ".join(expected.split()), " ".join(printed.split())
    pattern, numbers, end = "", [], 0
    for found in re.finditer(rf"…|\.\.\.|{NUMBER.pattern}", expected):
        pattern += re.escape(expected[end : found.start()])
        end = found.end()
        if found[0] in ("…", "..."):
            pattern += ".*?"
        elif "." in found[0] or "e" in found[0]:
            pattern += f"({NUMBER.pattern})"
            numbers.append(found[0])
        else:
            pattern += re.escape(found[0])
    matched = re.fullmatch(pattern + re.escape(expected[end:]), printed, re.S)
    close = matched and all(_close(*pair) for pair in zip(numbers, matched.groups(), strict=True))
    assert close, f"\nexpected: {expected}\nprinted:  {printed}"


def _close(expected: str, printed: str) -> bool:
    digits, _, exponent = expected.replace(",", "").partition("e")
    step = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
    return abs(float(expected.replace(",", "")) - float(printed.replace(",", ""))) <= 1.01 * step
