"""The command ``qpeft``: info, retrieve, synthesize, train, distill, calibrate, index, rerank, evaluate, compare, fuse,
convert, serve and demo.

Each command is a module in this folder. It imports torch when it runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Annotated, Any

import typer

from ..utils.console import Interrupted, standard_streams
from ..utils.environment import VERSION
from ..utils.interrupts import Interrupts
from ..utils.memory import is_surely_out_of_memory
from ..utils.text import one_line
from . import (
    calibrate,
    compare,
    convert,
    demo,
    distill,
    evaluate,
    fuse,
    index,
    info,
    rerank,
    retrieve,
    serve,
    synthesize,
    train,
)
from .common import expect_paths, spread_measures
from .sections import SectionedCommand

# the base class of errors about arguments, for which typer has no public name
ClickException: type[Any] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    help="Rerank text with a frozen language model and a few trained clues (Q-PEFT).",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for module in (
    info, retrieve, synthesize, train, distill, calibrate, index, rerank, evaluate, compare, fuse, convert, serve, demo,
):  # fmt: skip
    app.command(name=module.__name__.rpartition(".")[2], cls=SectionedCommand)(module.command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(VERSION)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for an error, 130 after Ctrl-C, 141 where the reader of
    stdout left early (``| head``) and all else is done and saved.

    An error is one line on stderr; ``QPEFT_DEBUG=1`` shows the traceback instead.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    with standard_streams() as stdout:
        code = _run(arguments)
        stdout.flush()
        if stdout.error and not code:
            if isinstance(stdout.error, BrokenPipeError):
                return 141
            return _fail(arguments, f"cannot write to stdout: {stdout.error.strerror}; all else is done")
        return code


@cache
def _command() -> Callable[..., int | None]:
    """Read the options of all commands from their functions, once: it takes 20 ms."""
    return typer.main.get_command(app)


def _run(arguments: Sequence[str]) -> int:
    with Interrupts() as interrupts:
        try:
            for known in app.registered_commands:
                if known.name == arguments[0] and known.callback is not None:
                    expect_paths(known.callback, arguments)
            code = _command()(spread_measures(arguments), prog_name="qpeft", standalone_mode=False) or 0
            return _fail(arguments, "interrupted", code) if code == 130 else code  # Ctrl-C, as typer reports it
        except (KeyboardInterrupt, typer.Abort):
            return _fail(arguments, "interrupted", 130)
        except Interrupted as error:
            return _fail(arguments, str(error), 130)
        except ClickException as error:  # an unknown option, a missing argument, ...
            return _fail(arguments, error.format_message() + (_one_value_each(error, arguments) or " (see --help)"))
        except Exception as error:
            notes = getattr(error, "__notes__", ())
            if interrupts.caused(error):
                return _fail(arguments, "; ".join(["interrupted", *notes]), 130)
            if not _is_the_users(error) or os.environ.get("QPEFT_DEBUG", "0") not in ("", "0"):
                raise
            return _fail(arguments, "; ".join([_message(error), *notes]))


def _is_the_users(error: Exception) -> bool:
    """Return True for errors that the user can solve; others are shown with their traceback.

    Of torch's own errors the user can solve only a lack of memory.
    """
    if isinstance(error, RuntimeError):
        return isinstance(error, RecursionError) or is_surely_out_of_memory(error)
    return isinstance(error, (ValueError, TypeError, OSError, ImportError, MemoryError))


def _fail(arguments: Sequence[str], message: str, code: int = 2) -> int:
    names = [command.name for command in app.registered_commands]
    command = next((argument for argument in arguments if argument in names), None)
    print(one_line(f"{'qpeft ' + command if command else 'qpeft'}: error: {message}"), file=sys.stderr)
    return code


def _one_value_each(error: Exception, arguments: Sequence[str]) -> str:
    """Return what to do where an option was given several values, which then look like unexpected arguments."""
    found = re.match(r"Got unexpected extra argument(?:s|\(s\))? \((\S+?)\)*(?: |$)", getattr(error, "message", ""))
    before = (
        [argument for argument in arguments[: arguments.index(found[1])] if argument.startswith("--")]
        if found and found[1] in arguments
        else []
    )
    option = before[-1].partition("=")[0] if before else ""
    return f"; {option} takes one value: repeat it, or put commas between them, as --help says" if option else ""


def _message(error: Exception) -> str:
    """Return the message of an error, of an error of the system ("[Errno 13] ...") its readable part."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, (MemoryError, RuntimeError)) and not isinstance(error, RecursionError):
        return f"not enough memory ({error})" if str(error) else "not enough memory"
    if isinstance(error, RecursionError):
        return "an input is nested too deeply"
    return str(error) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
