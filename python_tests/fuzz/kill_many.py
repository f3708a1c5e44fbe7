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
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
from families.tiny import tiny_lm, tiny_tokenizer  # noqa: E402
from jobs.compare_job import make_compare_job, write_plan  # noqa: E402
from small_data import write_lines  # noqa: E402
from tqdm import tqdm  # noqa: E402

import qpeft_ext as qpeft  # noqa: E402
from qpeft_ext.cli import main as qpeft_command  # noqa: E402
from qpeft_ext.prefixes import index_writer as index_run
from qpeft_ext.ranking import run as rerank_run  # noqa: E402

QUERIES, CANDIDATES, DOCUMENTS = 24, 8, 40
WORDS = "tide moon sea boat harbour wind wave month earth low high pull rope lamp fog gull net pier map sail".split()
SIGNALS = [signal.SIGKILL] * 4 + [signal.SIGTERM, signal.SIGINT]
SECONDS = 120  # what takes longer has not ended
_LONGEST_LINE = 300


@dataclass
class Command:
    """arguments: of the folder for its output.  resumed: those after it was ended, if others.
    made: which files of that folder are compared.  share: how often it is drawn.
    """

    name: str
    arguments: Callable[[Path], list[str]]
    resumed: Callable[[Path], list[str]] | None = None
    made: Callable[[Path], bool] = lambda path: True
    share: float = 1.0
    expected: dict[str, bytes] = field(default_factory=dict)
    seconds: float = 0.0


# -- the job ------------------------------------------------------------------------------------------------------


def make_job(folder: Path) -> Path:
    draw = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    data = folder / "data"
    write_lines(
        data / "corpus.jsonl",
        (json.dumps({"_id": f"d{i}", "title": "", "text": text(1, 14)}) for i in range(DOCUMENTS)),
    )
    write_lines(data / "queries.jsonl", (json.dumps({"_id": f"q{i}", "text": text(1, 4)}) for i in range(QUERIES)))
    write_lines(
        data / "run.trec",
        (
            f"q{i} Q0 d{(i * 11 + 3 * rank) % DOCUMENTS} {rank} {-rank}.0 first"
            for i in range(QUERIES)
            for rank in range(CANDIDATES)
        ),
    )
    write_lines(
        data / "qrels" / "test.tsv",
        ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i * 11 % DOCUMENTS}\t1" for i in range(QUERIES))],
    )
    write_lines(
        folder / "train.jsonl",
        (
            json.dumps({"query": text(1, 4), "positives": [text(2, 9)], "negatives": [text(2, 9), text(2, 9)]})
            for _ in range(12)
        ),
    )
    make_compare_job(folder / "compared")
    for dtype in (torch.float32, torch.bfloat16):
        lm = folder / str(dtype).removeprefix("torch.")
        tiny_lm("llama").to(dtype).save_pretrained(lm)
        tiny_tokenizer().save_pretrained(lm)
        for clues, options in (
            ("top_k", {"generated_lora_rank": 4, "target_modules": ("o_proj",)}),
            ("attention", {"num_heads": 4}),
        ):
            model = qpeft.get_qpeft_model(qpeft.load_lm(lm), qpeft.QPeftConfig(clues=clues, rank=8, **options))
            torch.manual_seed(0)
            for module in model.trained_modules.values():
                for parameter in module.parameters():
                    torch.nn.init.normal_(parameter, std=0.3)
            model.save_pretrained(folder / f"{clues}-{lm.name}")
    return folder


def commands(job: Path) -> Iterator[Command]:
    for dtype in ("float32", "bfloat16"):
        yield from _commands_of_lm(job, dtype)
    data, run = str(job / "data"), str(job / "data" / "run.trec")
    yield Command("fuse", lambda out: ["fuse", run, run, "--output", str(out / "fused.trec.gz")], share=0.3)
    yield Command(
        "convert", lambda out: ["convert", data, str(out / "made.jsonl"), "--to", "rankllm", "--run", run], share=0.3
    )
    yield Command("retrieve", lambda out: ["retrieve", "--data", data, "--output", str(out / "bm25.trec")], share=0.3)


def _commands_of_lm(job: Path, dtype: str) -> Iterator[Command]:
    data, lm, cpu = str(job / "data"), str(job / dtype), ["--device", "cpu"]

    def rerank(clues: str, name: str, *options: str) -> Callable[[Path], list[str]]:
        return lambda out: [
            "rerank",
            "--model",
            str(job / f"{clues}-{dtype}"),
            "--data",
            data,
            "--run",
            str(job / "data" / "run.trec"),
            "--output",
            str(out / name),
            "--measures",
            "RR@10",
            *(cpu if "--devices" not in options else ()),
            *options,
        ]

    index = str(job / f"index-{dtype}")
    yield Command(f"rerank {dtype}", rerank("top_k", "run.trec"), share=2)
    yield Command(f"rerank attention {dtype}", rerank("attention", "run.trec"), share=2)
    yield Command(f"rerank .gz {dtype}", rerank("attention", "run.trec.gz"), share=2)
    yield Command(f"rerank --upr {dtype}", rerank("top_k", "run.trec", "--upr", "--similarity-only"), share=2)
    yield Command(f"rerank --index {dtype}", rerank("attention", "run.trec", "--index", index))
    yield Command(
        f"rerank cached {dtype}", rerank("attention", "run.trec", "--cache-bytes", "1000000", "--deterministic")
    )
    yield Command(f"rerank two workers {dtype}", rerank("top_k", "run.trec", "--devices", "cpu,cpu"), share=0.05)
    yield Command(
        f"index {dtype}",
        lambda out: [
            "index",
            data,
            "--out",
            str(out / "index"),
            "--base-model",
            lm,
            "--max-tokens-per-batch",
            "256",
            *cpu,
        ],
        share=2,
    )
    yield Command(
        f"synthesize {dtype}",
        lambda out: [
            "synthesize",
            "--data",
            data,
            "--base-model",
            lm,
            "--output",
            str(out / "made.jsonl"),
            "--max-new-tokens",
            "6",
            "--keep-unfinished",
            "--min-tokens",
            "1",
            "--no-round-trip",
            "--queries-per-document",
            "5",
            "--num-negatives",
            "2",
            "--max-tokens-per-batch",
            "400",
            *cpu,
        ],
    )

    def train(out: Path) -> list[str]:
        return [
            "train",
            "--base-model",
            lm,
            "--train",
            str(job / "train.jsonl"),
            "--output",
            str(out / "adapter"),
            "--num-negatives",
            "2",
            "--rank",
            "4",
            "--generated-lora-rank",
            "0",
            "--save-steps",
            "1",
            "--deterministic",
            *cpu,
        ]

    yield Command(
        f"train {dtype}",
        train,
        lambda out: [*train(out), "--resume"],
        made=lambda path: path.parent.name == "adapter" and path.name != "README.md",
    )
    plan = job / f"plan-{dtype}.yaml"
    write_plan(
        plan,
        job / "compared",
        ["upr: {method: upr}", "ours: {method: q_peft_r, learning_rate: 0.01}"],
        **{
            "cache_bytes: 1_000_000": "cache_bytes: 0",
            "seeds: [0, 1]": "seeds: [0]",
            "dtype: float32": f"dtype: {dtype}",
        },
    )
    yield Command(
        f"compare {dtype}",
        lambda out: [
            "compare",
            str(plan),
            "--output",
            str(out / "results"),
            "--data-root",
            str(job / "compared"),
            *cpu,
        ],
        made=lambda path: path.name in ("run.trec.gz", "adapter_model.safetensors"),
        share=0.5,
    )


# -- children -----------------------------------------------------------------------------------------------------


class Child:
    """A forked process that runs a command. room: bytes that a file may have."""

    def __init__(self, arguments: list[str], room: int | None = None) -> None:
        self._pipe, theirs = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                code = self._run(arguments, theirs, room)
            finally:  # even after an error, so that the child never runs the rest of its parent's program
                os._exit(code)
        os.close(theirs)

    @staticmethod
    def _run(arguments: list[str], stderr: int, room: int | None) -> int:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            torch.set_num_threads(1)  # its pool is made again here, before threads that load weights do so at once
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(stderr, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            if room is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
            code = qpeft_command(arguments)
        except KeyboardInterrupt:  # before the command, or behind it
            code = 130
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        return code

    def send(self, which: signal.Signals) -> None:
        os.kill(self.pid, which)  # it is not waited for yet, so its id is not another's

    def end(self) -> tuple[int, str]:
        """Exit code, negative for a signal, and stderr."""
        latest = time.monotonic() + SECONDS
        text = b""
        os.set_blocking(self._pipe, False)
        status = None
        while status is None:
            with contextlib.suppress(BlockingIOError):
                text += os.read(self._pipe, 1 << 16)
            done, code = os.waitpid(self.pid, os.WNOHANG)
            if done:
                status = os.waitstatus_to_exitcode(code)
            elif time.monotonic() > latest:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"it did not end in {SECONDS} s")
            else:
                time.sleep(0.002)
        with contextlib.suppress(BlockingIOError):
            while more := os.read(self._pipe, 1 << 16):
                text += more
        os.close(self._pipe)
        return status, text.decode(errors="replace")


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
            children = [Child(arguments, room) for _ in range(2 if kind == "two" else 1)]
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
                code, err = child.end()
                happened.append(f"-> {code} {err[-300:]!r}")
                check_end(code, err, (-which,))
            if is_there(command, out):
                break
        if not is_there(command, out):
            code, err = Child(arguments).end()
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
                code, err = Child(command.arguments(out)).end()
            assert code == 0, f"{command.name}: {code} {err}"
            command.seconds = time.monotonic() - started
            there = files(out, command)
            assert there and command.expected in ({}, there), f"{command.name}: two runs differ"
            command.expected = there
        made.append(command)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="kills, full disks and runs of two at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of the name of the commands")
    parser.add_argument("--keep", type=Path, help="folder for what failed")
    options = parser.parse_args()
    torch.set_num_threads(1)  # before the fork: children inherit no pool of threads
    tqdm.set_lock(RLock())  # its own lock is shared by all processes, and a killed one would never give it back
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
