"""One valid file of every kind that the package reads, damaged at random: a right result, or exit 2 with one line.

    python python_tests/fuzz/files.py --count 5000 --seed 0     prints what failed; exit code 1 if something did
    python python_tests/fuzz/files.py --seed 0 --only 123 -v    one case again, with its output

Each case runs in a child of a process that has imported everything. It must end within 10 s of CPU time and 500 MB
above what the process had, without a traceback; with exit 2 it says why in one line of at most 300 characters, and
leaves no output. With exit 0 its result is finite, and that of the undamaged file where a cache or a part was damaged.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import gzip
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from formats.format_readers import READERS, VALID
from fuzz.mutations import damaged, put
from jobs.tiny_job import make_job
from peft import LoraConfig, get_peft_model

import qpeft_ext as qpeft
from qpeft_ext import formats
from qpeft_ext.cli import main
from qpeft_ext.lm.loading import load_tokenizer
from qpeft_ext.utils.text import one_line

CPU_SECONDS, WALL_SECONDS, MEGABYTES = 10, 100, 500

RERANK = "rerank --model {job}/adapter --data {job}/data --run {job}/data/run.trec --output {out} --device cpu"
UPR = "rerank --base-model {job}/lm --upr --data {job}/data --run {job}/data/run.trec --output {out} --device cpu"
PACKED = "rerank --base-model {job}/lm --upr --data {job}/gz --run {job}/gz/run.trec.gz --output {out} --device cpu"
BM25 = "retrieve --data {job}/data --output {out}"
BM25_GZ = "retrieve --data {job}/gz --output {out}"
EVALUATE = "evaluate --qrels {job}/data/qrels/test.tsv {job}/data/run.trec --output {out}.json"
FUSE = "fuse {job}/data/run.trec {job}/gz/run.trec.gz --output {out}"
LORA = RERANK.replace("/adapter", "/lora")
PART = RERANK.replace("{out}", "{job}/part/run.trec")
INDEX = UPR + " --index {job}/index"
AGAIN = "index {job}/data --out {job}/index --base-model {job}/lm --device cpu"
TRAIN = (
    "train --base-model {job}/lm --train {job}/train.jsonl --output {out} --num-negatives 1 --max-steps 1 "
    "--device cpu --generated-lora-rank 0"
)
RESUME = TRAIN.replace("{out}", "{job}/trained").replace("--max-steps 1", "--max-steps 3 --save-steps 1") + " --resume"
COMPARE = "compare {job}/plan.yaml --output {job}/compared --data-root {job} --device cpu"


@dataclass(frozen=True)
class Kind:
    """A file of the job (a pattern), and what reads it. exact: the result must be that of the undamaged file."""

    file: str
    command: str | Callable[[Path, Path], None]
    exact: bool = False
    weight: int = 4
    output: str = "{out}"

    @property
    def parts(self) -> set[str]:
        """Names of the job's files and folders that the command needs."""
        named = re.findall(r"\{job\}/([\w.]+)", self.command) if isinstance(self.command, str) else ["adapter"]
        return {self.file.partition("/")[0], "lm", "data", "cache", *named}


def predict_with_disk(job: Path, out: Path) -> None:
    cache = qpeft.DocumentCache(0, disk=job / "disk", disk_bytes=1 << 30)
    reranker = qpeft.Reranker.from_pretrained(job / "adapter", device="cpu", cache=cache)
    scores = reranker.predict([(query, text) for query in ("why tides", "moon") for text in ("sea", "the moon")])
    out.write_text("".join(f"{score:.4f}\n" for score in scores))


def reader(name: str) -> Callable[[Path, Path], None]:
    def read(job: Path, out: Path) -> None:
        out.write_text(f"{len(str(READERS[name](job / 'formats' / name.replace(' ', '-'))))}\n")

    return read


KINDS = [
    Kind("adapter/adapter_config.json", RERANK, weight=8), Kind("adapter/adapter_model.safetensors", RERANK),
    Kind("lm/config.json", UPR, weight=6), Kind("lm/tokenizer.json", UPR), Kind("lm/tokenizer_config.json", UPR),
    Kind("lm/model.safetensors", UPR), Kind("lm/generation_config.json", UPR, weight=1),
    Kind("lora/lm_adapter/adapter_config.json", LORA, weight=6),
    Kind("lora/lm_adapter/adapter_model.safetensors", LORA),
    Kind("data/corpus.jsonl", RERANK), Kind("data/queries.jsonl", UPR), Kind("data/qrels/test.tsv", UPR),
    Kind("data/run.trec", RERANK), Kind("data/corpus.jsonl", BM25), Kind("data/queries.jsonl", BM25),
    Kind("gz/corpus.jsonl.gz", PACKED), Kind("gz/queries.jsonl.gz", PACKED), Kind("gz/run.trec.gz", PACKED),
    Kind("gz/qrels/test.tsv.gz", PACKED), Kind("data/qrels/test.tsv", EVALUATE, output="{out}.json"),
    Kind("data/run.trec", EVALUATE, output="{out}.json"),
    Kind("gz/run.trec.gz", FUSE), Kind("data/run.trec", FUSE),
    Kind("index/manifest.json", INDEX, weight=6), Kind("index/shard-*", INDEX, exact=True, weight=8),
    Kind("index/shard-*", AGAIN, output="{job}/index/manifest.json"),
    Kind("disk/*.safetensors", predict_with_disk, exact=True, weight=8),
    Kind("cache/corpus-*.sqlite", BM25_GZ, exact=True), Kind("cache/corpus-*.jsonl", BM25_GZ, exact=True),
    Kind("cache/corpus-*.jsonl", PACKED, exact=True), Kind("cache/bm25-*/*", BM25_GZ, exact=True, weight=6),
    Kind("part/run.trec.part", PART, exact=True, output="{job}/part/run.trec", weight=6),
    Kind("part/run.trec.part.json", PART, exact=True, output="{job}/part/run.trec"),
    Kind("plan.yaml", COMPARE, weight=4, output="{job}/compared/comparison.json"),
    Kind("compared/*/*/*/result.json", COMPARE, weight=1, output="{job}/compared/comparison.json"),
    Kind("compared/*/*/*/run.trec.gz", COMPARE, output="{job}/compared/comparison.json", weight=1),
    Kind("train.jsonl", TRAIN, output="{out}/adapter_config.json"),
    Kind("trained/checkpoints/checkpoint-2/*.json", RESUME, output="{job}/trained/adapter_config.json", weight=2),
    Kind("trained/checkpoints/checkpoint-2/*", RESUME, output="{job}/trained/adapter_config.json", weight=2),
    *(Kind(f"formats/{name.replace(' ', '-')}", reader(name), weight=1) for name in READERS),
]  # fmt: skip


def make_whole(job: Path) -> None:
    """Everything undamaged, in ``job``."""
    make_job(job)
    for source in [*(job / "data").rglob("*.*")]:
        target = job / "gz" / f"{source.relative_to(job / 'data')}.gz"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(gzip.compress(source.read_bytes(), mtime=0))
    lm = get_peft_model(qpeft.load_lm(job / "lm"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    tokenizer = load_tokenizer(job / "lm")
    qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="top_k", rank=4), tokenizer).save_pretrained(job / "lora")
    config = job / "lora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(job / "lm")}))
    (job / "formats").mkdir()
    for name, contents in VALID.items():
        (job / "formats" / name.replace(" ", "-")).write_bytes(contents[0])
    (job / "train.jsonl").write_text(
        "".join(
            json.dumps(
                {"query": f"tide {i}?", "positives": [f"the moon {i} pulls"], "negatives": [f"boat {i}", "wind"]}
            )
            + "\n"
            for i in range(12)
        )
    )
    (job / "plan.yaml").write_text(
        f"lm: {job}/lm\ndtype: float32\nmeasures: [nDCG@10, RR@10]\nseeds: [0]\noptions: {{max_document_tokens: 40}}\n"
        "collections:\n  tiny: &it\n    data: data\n    split: test\n    candidates: 3\n"
        "  again:\n    <<: *it\n    queries: 2\nmethods:\n  UPR: {method: upr}\n  similarity: {method: similarity}\n"
    )
    (job / "part").mkdir()


def warm(job: Path, out: Path, commands: set) -> None:
    """Run every command once here, so that children find all modules imported and all caches filled."""
    if PART in commands:
        finish, formats.PartialRun.finish = formats.PartialRun.finish, lambda self: self.close()
        assert main(arguments(PART, job, out)) == 0  # leaves its part, whole
        formats.PartialRun.finish = finish
    first = {INDEX: AGAIN, RESUME: RESUME.replace("--max-steps 3", "--max-steps 2").replace(" --resume", "")}
    for command in [first[command] for command in first if command in commands] + sorted(
        command for command in commands if isinstance(command, str) and command not in (PART, RESUME)
    ):
        assert main(arguments(command, job, out)) == 0, command
        for left in out.parent.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    if predict_with_disk in commands:
        predict_with_disk(job, out)
        out.unlink()
    for left in (job / "trained").glob("[!c]*"):  # the checkpoints alone: as a kill would leave them
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def arguments(command: str, job: Path, out: Path) -> list[str]:
    return [word.format(job=job, out=out) for word in command.split()]


class Fuzz:
    """The undamaged job and its results, and a place where damaged copies of it are tried one after the other."""

    def __init__(self, folder: Path, kinds: list[Kind], verbose: bool = False) -> None:
        torch.set_num_threads(1)
        self.folder, self.verbose = folder, verbose
        self.job, self.whole, self.out = folder / "job", folder / "whole", folder / "out" / "result"
        self.out.parent.mkdir()
        os.environ["QPEFT_CACHE"] = str(self.job / "cache")
        make_whole(self.job)
        with open(folder / "log", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            warm(self.job, self.out, {kind.command for kind in kinds})
        shutil.copytree(self.job, self.whole, symlinks=True)
        gc.collect()
        gc.freeze()
        self.expected: dict[Kind, object] = {}

    def case(self, kind: Kind, draw: random.Random) -> str:
        """Damage a file and use it. Returns: what is wrong, "" if nothing is."""
        if kind not in self.expected:
            code, said, _ = self._run(kind, lambda: None)
            assert code == 0, f"{kind.file}: the undamaged file gives {code}: {said}"
            self.expected[kind] = self._result(kind)

        def damage() -> None:
            path = draw.choice(sorted(self.job.glob(kind.file)))
            put(path, damaged(path.read_bytes(), draw, path.name))

        code, said, megabytes = self._run(kind, damage)
        if self.verbose:
            print(f"exit {code}, {megabytes} MB\n{said}")
        lines = said.splitlines()
        if code not in (0, 2) or "Traceback" in said:
            return f"exit {code}: {(lines or [''])[-1][:200]}"
        if megabytes > MEGABYTES:
            return f"{megabytes} MB"
        if code == 2 and not (len(lines) == 1 and re.match(r"qpeft( \w+)?: error: ", said) and len(lines[0]) <= 300):
            return f"{len(lines)} lines: {' | '.join(line[:300] for line in lines)}"
        left = [path.name for path in self.out.parent.rglob("*") if code == 2 or path.name.endswith(".tmp")]
        if left:
            return f"left {left}"
        return self._compare(kind) if code == 0 else ""

    def _run(self, kind: Kind, damage: Callable[[], None]) -> tuple[int, str, int]:
        """Exit code (negative: the signal that ended it), stderr, megabytes above this process."""
        for folder in (self.job, self.out.parent):
            shutil.rmtree(folder, ignore_errors=True)
        self.job.mkdir()
        for part in self.whole.iterdir():
            if part.name in kind.parts:
                copy = shutil.copytree if part.is_dir() else shutil.copy2
                copy(part, self.job / part.name)
        self.out.parent.mkdir()
        damage()
        said = self.folder / "stderr"
        before = int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _limit(said)
                code = self._use(kind)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        deadline = time.monotonic() + WALL_SECONDS
        while True:
            done, status, usage = os.wait4(pid, os.WNOHANG)
            if done:
                break
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return -signal.SIGALRM, f"{said.read_text(errors='replace')}\nno end", 0
            time.sleep(0.002)
        megabytes = max(0, usage.ru_maxrss - before) // 1024
        return os.waitstatus_to_exitcode(status), said.read_text(encoding="utf-8", errors="replace"), megabytes

    def _use(self, kind: Kind) -> int:
        if isinstance(kind.command, str):
            return main(arguments(kind.command, self.job, self.out))
        try:
            kind.command(self.job, self.out)
        except (ValueError, TypeError, OSError) as error:
            print(one_line(f"qpeft: error: {error}"), file=sys.stderr)
            return 2
        return 0

    def _result(self, kind: Kind) -> object:
        """What came out: the values of a run or of JSON; texts as they are."""
        path = Path(kind.output.format(job=self.job, out=self.out))
        if not path.is_file():
            return None
        if not isinstance(kind.command, str):
            return path.read_text()
        if path.suffix == ".json":
            return json.loads(path.read_text(), parse_constant=lambda name: [name])
        return {query: dict(ranking) for query, ranking in formats.read_run(path).items()}

    def _compare(self, kind: Kind) -> str:
        expected, got = self.expected[kind], self._result(kind)
        if got is None:
            return "exit 0, and no result"
        if isinstance(kind.command, str) and not kind.output.endswith(".json"):
            if not all(math.isfinite(score) for ranking in got.values() for score in ranking.values()):
                return "a score that is not finite"
            if kind.exact and not _close(expected, got):
                return "another result"
        elif kind.exact and expected != got:
            return "another result"
        return ""


def _close(expected: dict, got: dict) -> bool:
    """Equal runs, up to what a batch of another shape changes."""
    return got.keys() == expected.keys() and all(
        got[query].keys() == ranking.keys() and all(abs(got[query][doc] - ranking[doc]) < 1e-3 for doc in ranking)
        for query, ranking in expected.items()
    )


def _limit(said: Path) -> None:
    """Redirect this child's standard streams, limit its CPU time and memory, and print a traceback if it is killed."""
    for number, path in ((0, os.devnull), (1, os.devnull), (2, said)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC if number == 2 else os.O_RDWR, 0o600), number)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False, errors="backslashreplace")
    faulthandler.enable(sys.stderr)
    used = int(sum(os.times()[:2]))
    resource.setrlimit(resource.RLIMIT_CPU, (used + CPU_SECONDS, used + CPU_SECONDS + 2))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (2 << 30), size + (2 << 30)))


def fuzz(count: int, seed: int, only: int | None = None, like: str = "", verbose: bool = False) -> dict[int, str]:
    """Try ``count`` cases. Returns: number of a case -> what is wrong with it."""
    kinds = [kind for kind in KINDS if re.search(like, kind.file)]
    wrong, tried = {}, Counter()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # thousands of copies need no disk
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        tries = Fuzz(Path(folder).resolve(), kinds, verbose)
        for i in range(count) if only is None else [only]:
            draw = random.Random(f"{seed}/{i}")
            kind = draw.choices(kinds, [kind.weight for kind in kinds])[0]
            tried[kind.file] += 1
            if problem := tries.case(kind, draw):
                wrong[i] = f"{kind.file}: {problem}"
                if __name__ == "__main__":
                    print(f"case {i}: {wrong[i]}", flush=True)
    if verbose:
        print(dict(tried))
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one case")
    parser.add_argument("--like", default="", help="files whose pattern matches this regular expression")
    parser.add_argument("-v", "--verbose", action="store_true")
    options = parser.parse_args()
    begin = time.monotonic()
    found = fuzz(options.count, options.seed, options.only, options.like, options.verbose)
    print(
        f"{options.count if options.only is None else 1} damaged files in {time.monotonic() - begin:.0f} s: "
        f"{len(found)} wrong"
    )
    sys.exit(bool(found))
