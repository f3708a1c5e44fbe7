"""Kill every long command at random moments, resume it, and compare all that it wrote with one run, to the byte.

    make kills    (or: python python_tests/fuzz/kill_many.py --count 1000 --seed 0 --only rerank --keep FOLDER)

Children are forked from one warm process, so that a kill costs a fraction of a second. They are ended by SIGKILL,
SIGTERM or Ctrl-C; some write to a disk that is full after so many bytes (RLIMIT_FSIZE); some run two at once on one
output. Each is resumed, and perhaps ended again, until it is done. Prints a table; exit code 1 if a file differs, a
command does not end, or says more than one line.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from fuzz.kill_commands import Command, commands, make_job
from jobs.processes import forked_command

from qpeft_ext.cli import main as qpeft_command
from qpeft_ext.prefixes import index_writer as index_run
from qpeft_ext.ranking import run as rerank_run

SIGNALS = [signal.SIGKILL] * 4 + [signal.SIGTERM, signal.SIGINT]
_LONGEST_LINE = 300


def files(folder: Path, command: Command) -> dict[str, bytes]:
    """What is compared; hidden files (locks, and what a kill left of a file that was being written) are not."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and command.made(path)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def is_there(command: Command, out: Path) -> bool:
    """Whether a training ended before it was to be ended: it is not resumed then."""
    return command.resumed is not None and (out / "adapter" / "adapter_config.json").exists()


def check_end(code: int, err: str, ended_by: tuple[int, ...]) -> None:
    lines = [line for line in err.splitlines() if "warn" not in line.lower()]
    assert "Traceback" not in err or "Exception ignored in" in err, err  # Ctrl-C in a destructor has no effect
    assert code in (0, 2, 130, *ended_by), (code, err)
    if code == 2:
        errors = [line for line in lines if "error:" in line]
        assert len(errors) == 1 and len(errors[0]) <= _LONGEST_LINE, err


def interrupted_run(command: Command, out: Path, draw: random.Random, counts: Counter) -> None:
    """One run of a command with all that happens to it. Raises: AssertionError if it is not what it must be."""
    happened, begun = [], False
    try:
        while True:
            arguments = (command.resumed if begun and command.resumed else command.arguments)(out)
            if begun and draw.random() > 0.3:
                break
            begun = True
            kind = draw.choices(["kill", "full", "two"], [0.75, 0.15, 0.1])[0]
            largest = max(map(len, command.expected.values()))
            room = draw.randrange(2 * largest) if kind == "full" else None
            children = [forked_command(arguments, room=room) for _ in range(2 if kind == "two" else 1)]
            if kind != "full":
                moment = draw.uniform(0, 1.05) * command.seconds * len(children)
                which = draw.choice(SIGNALS)
                time.sleep(moment)
                children[0].send(which)
                happened.append(f"{len(children)} x {which.name} after {moment:.3f} s")
            else:
                which = signal.SIGKILL
                happened.append(f"full after {room} bytes")
            counts[kind if kind != "kill" else which.name] += 1
            for child in children:
                code, _, err = child.end()
                happened.append(f"-> {code} {err[-300:]!r}")
                check_end(code, err, (-which,))
            if is_there(command, out):
                break
        if not is_there(command, out):
            code, _, err = forked_command(arguments).end()
            happened.append(f"-> {code} {err[-300:]!r}")
            assert code == 0, "it was not resumed"
        made = files(out, command)
        assert made.keys() == command.expected.keys(), sorted(made.keys() ^ command.expected.keys())
        different = [name for name, data in made.items() if data != command.expected[name]]
        assert not different, f"{different} differ"
    except AssertionError as error:
        raise AssertionError(f"{error}; {'; '.join(happened)}") from None


# -- all of it ----------------------------------------------------------------------------------------------------


def prepare(job: Path, scratch: Path, only: str) -> list[Command]:
    """The commands with what they must write. The first run of each is in this process: it imports what is needed."""
    rerank_run.PAIRS_PER_BLOCK = 32
    index_run.SHARD_BYTES = 8_000
    made = []
    for command in commands(job):
        if only and only not in command.name:
            continue
        if "--index" in command.name and not (job / f"index-{command.name.split()[-1]}").exists():
            dtype = command.name.split()[-1]
            assert (
                qpeft_command(
                    [
                        "index",
                        str(job / "data"),
                        "--out",
                        str(job / f"index-{dtype}"),
                        "--base-model",
                        str(job / dtype),
                        "--device",
                        "cpu",
                    ]
                )
                == 0
            )
        for number in range(2):
            out = scratch / f"{command.name}-{number}"
            out.mkdir()
            started = time.monotonic()
            if number == 0 and "two workers" not in command.name:
                code, err = qpeft_command(command.arguments(out)), ""
            else:
                code, _, err = forked_command(command.arguments(out)).end()
            assert code == 0, f"{command.name}: {code} {err}"
            command.seconds = time.monotonic() - started
            there = files(out, command)
            assert there and command.expected in ({}, there), f"{command.name}: two runs differ"
            command.expected = there
        made.append(command)
    return made


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="kills, full disks and runs of two at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of the name of the commands")
    parser.add_argument("--keep", type=Path, help="folder for what failed")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # before the fork: children inherit no pool of threads
    draw, counts, of_command, failures = random.Random(options.seed), Counter(), Counter(), []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        scratch = Path(name)
        os.environ["QPEFT_CACHE"] = str(scratch / "cache")
        with open(os.devnull, "w") as null:
            stack.enter_context(contextlib.redirect_stdout(null))
            stack.enter_context(contextlib.redirect_stderr(null))
            every = prepare(make_job(scratch / "job"), scratch, options.only)
            stack.pop_all().close()
        prepared = time.monotonic() - begun
        while counts.total() < options.count:
            command = draw.choices(every, [each.share for each in every])[0]
            out = scratch / "out"
            out.mkdir()
            of_command[command.name] += 1
            try:
                interrupted_run(command, out, draw, counts)
            except AssertionError as error:
                failures.append(f"{command.name}: {error}")
                print(f"FAILED {failures[-1]}", flush=True)
                if options.keep:
                    shutil.copytree(out, options.keep / f"{len(failures)}", dirs_exist_ok=True)
            shutil.rmtree(out)
    for each in every:
        print(f"{each.name:32s} {of_command[each.name]:5d} runs of {each.seconds:.2f} s")
    print(
        f"{counts.total()} interruptions ({', '.join(f'{count} {kind}' for kind, count in counts.items())}) of "
        f"{of_command.total()} runs in {time.monotonic() - begun - prepared:.0f} s (and {prepared:.0f} s before): "
        f"{len(failures)} failed"
    )
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
