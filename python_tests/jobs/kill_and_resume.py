"""Train tiny adapters in child processes that are killed, resume them, and compare the adapters.

Used by test_trainer_checkpoints.py. Every kill is a real SIGKILL.
"""

from __future__ import annotations

import io
import os
import random
import shutil
import signal
import time
from pathlib import Path

import torch
import transformers
from families.tiny import tiny_lm, tiny_tokenizer
from jobs.processes import Forked
from safetensors.torch import load_file

import qpeft_ext as qpeft
from qpeft_ext.adapters import files as adapter_files
from qpeft_ext.training import checkpoints

EXAMPLES = [
    {"query": f"tide {i}?", "positives": [f"the moon {i} pulls"], "negatives": [f"boat of {i}"]} for i in range(6)
]  # three batches of two queries an epoch: an optimiser step of two batches, and one of one


def build(folder: Path, deterministic: bool, cache_bytes: int) -> qpeft.QPeftTrainer:
    """Train with all that has a state: dropout, accumulation, early stopping, the best checkpoint, rotation."""
    config = qpeft.QPeftConfig(clues="attention", num_heads=4, rank=8, dropout=0.2, queries_per_group=2)
    model = qpeft.get_qpeft_model(tiny_lm("llama"), config, tiny_tokenizer())
    args = transformers.TrainingArguments(
        str(folder / "checkpoints"),
        num_train_epochs=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        warmup_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        use_cpu=True,
        disable_tqdm=True,
    )
    return qpeft.QPeftTrainer(
        model,
        args,
        EXAMPLES,
        EXAMPLES[:2],
        callbacks=[transformers.EarlyStoppingCallback(3)],
        deterministic=deterministic,
        cache_bytes=cache_bytes,
    )


def train(folder: Path, **options) -> None:
    trainer = build(folder, **options)
    trainer.train(resume_from_checkpoint=checkpoints.last_complete(folder / "checkpoints")[0] is not None)
    trainer.model.save_pretrained(folder / "final")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_the_middle_of(name: str, occurrence: int) -> None:
    """Arrange a SIGKILL after half of the bytes of a file, or half of a deletion."""
    seen = 0

    def occurred(damage) -> None:
        nonlocal seen
        seen += 1
        if seen == occurrence:
            damage()
            die()

    def half(path, data: bytes) -> None:
        if Path(path).name == name:
            occurred(lambda: Path(path).write_bytes(data[: len(data) // 2]))

    torch_save, safetensors_save, to_json = torch.save, adapter_files.save_file, transformers.TrainerState.save_to_json
    replace, rmtree = os.replace, shutil.rmtree

    def save(value, path, *args, **kwargs):
        if isinstance(path, str):
            buffer = io.BytesIO()
            torch_save(value, buffer)
            half(path, buffer.getvalue())
        torch_save(value, path, *args, **kwargs)

    def save_file(state, path, **kwargs):
        safetensors_save(state, path, **kwargs)
        half(path, Path(path).read_bytes())

    def save_to_json(state, path):
        to_json(state, path)
        half(path, Path(path).read_bytes())

    def replace_(source, target):
        if Path(target).name == checkpoints.MANIFEST == name:  # it has its own name only when it is whole
            occurred(lambda: Path(source).write_bytes(Path(source).read_bytes()[: Path(source).stat().st_size // 2]))
        replace(source, target)

    def rmtree_(folder, *args, **kwargs):
        if name == "rotation" and Path(folder).name.startswith("checkpoint-"):  # and no temporary folder
            occurred(lambda: sorted(path for path in Path(folder).iterdir() if path.is_file())[0].unlink())
        rmtree(folder, *args, **kwargs)

    torch.save, adapter_files.save_file, transformers.TrainerState.save_to_json = save, save_file, save_to_json
    os.replace, shutil.rmtree = replace_, rmtree_


def finish(folder: Path, **options) -> None:
    code, _, err = Forked(lambda: train(folder, **options)).end()
    if code:
        raise RuntimeError(f"training in {folder} failed: {code}: {err[-2000:]}")


def killed_in_the_middle_of(name: str, occurrence: int, folder: Path, **options) -> int:
    def work() -> None:
        die_in_the_middle_of(name, occurrence)
        train(folder, **options)

    code, _, err = Forked(work).end()
    if code != -signal.SIGKILL:
        raise RuntimeError(f"the process was to be killed while writing {name}, it ended with {code}: {err[-2000:]}")
    finish(folder, **options)
    return 1


def killed_at_random_moments(seed: int, seconds: float, folder: Path, **options) -> int:
    """Kill the training again and again, until one process gets to the end."""
    draw, restarts = random.Random(seed), 0
    while True:
        process = Forked(lambda: train(folder, **options))
        deadline = time.monotonic() + draw.uniform(0.1, 0.9) * seconds * (1 + restarts / 4)
        while process.running() and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill()
        code, _, err = process.end()
        if code == 0:
            return restarts
        if code != -signal.SIGKILL:
            raise RuntimeError(f"training in {folder} failed: {code}: {err[-2000:]}")
        restarts += 1


def compare(folder: Path, expected: Path, restarts: int) -> dict:
    ours, theirs = (path / "final" / "adapter_model.safetensors" for path in (folder, expected))
    ours, theirs = load_file(ours), load_file(theirs)
    return {
        "restarts": restarts,
        "bit_equal": all(torch.equal(ours[name], theirs[name]) for name in theirs),
        "difference": max(float((ours[name] - theirs[name]).abs().max()) for name in theirs),
    }


FILES = [
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    checkpoints.MANIFEST,
    "rotation",
]


def kill_and_resume(folder: Path) -> dict[str, dict]:
    """Return {scenario: {"restarts": int, "bit_equal": bool, "difference": float}}."""
    bits = {"deterministic": True, "cache_bytes": 1 << 20}
    near = {"deterministic": False, "cache_bytes": 1 << 20}
    build(folder / "unused", **bits).create_optimizer()  # all imports happen here, once
    start = time.monotonic()
    finish(folder / "expected", **bits)
    seconds = time.monotonic() - start
    finish(folder / "again", **bits)
    finish(folder / "near", **near)
    results = {"another run": compare(folder / "again", folder / "expected", 0)}

    def record(scenario: str, restarts: int, expected: str) -> None:
        results[scenario] = compare(folder / scenario, folder / expected, restarts)

    for name in FILES:
        record(name, killed_in_the_middle_of(name, 1 if name == "rotation" else 3, folder / name, **bits), "expected")
    record("first save", killed_in_the_middle_of("optimizer.pt", 1, folder / "first save", **bits), "expected")
    for seed in range(2):
        scenario = f"random {seed}"
        record(scenario, killed_at_random_moments(seed, seconds, folder / scenario, **bits), "expected")
    record("with a cache", killed_in_the_middle_of("optimizer.pt", 3, folder / "with a cache", **near), "near")
    return results
