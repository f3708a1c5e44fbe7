"""Training on two ranks (two gloo processes on the CPU) is training on one device with the same global batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jobs.tiny_job import make_job
from safetensors.torch import load_file

import qpeft_ext as qpeft

TESTS = Path(__file__).parents[1]
JOB = TESTS / "jobs" / "two_ranks.py"
SCENARIOS = ["one step", "uneven", "accumulation", "recomputed", "LoRA", "stream", "Adam, resumed"]


def on_ranks(world: int, *arguments) -> list[subprocess.Popen]:
    """The processes that torchrun would start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "PYTHONPATH": f"{Path(qpeft.__file__).parents[1]}:{TESTS}",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
    }
    return [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", *map(str, arguments)],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | shared | {"RANK": str(r), "LOCAL_RANK": str(r)},
        )
        for r in range(world)
    ]


def finish(processes: list[subprocess.Popen]) -> list[str]:
    """What each printed; all must succeed."""
    said = [process.communicate(timeout=300) for process in processes]
    for process, (_, err) in zip(processes, said, strict=True):
        assert process.returncode == 0, err[-3000:]
    return [out for out, _ in said]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("ranks")
    finish([*on_ranks(1, JOB, folder), *on_ranks(2, JOB, folder)])
    return folder


@pytest.mark.parametrize("name", SCENARIOS)
def test_equals_one_device(folder, name):
    one, two = (load_file(folder / f"{name}-{world}.safetensors") for world in (1, 2))
    assert one.keys() == two.keys()
    tolerance = 1e-4 if "Adam" in name else 1e-5  # Adam divides by the gradient's size, so rounding counts in full
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=tolerance)
    results = [json.loads((folder / f"{name}-{world}.json").read_text()) for world in (1, 2)]
    assert {"loss", "eval_loss", "eval_mrr", "eval_accuracy"} < results[0].keys()
    assert results[1] == pytest.approx(results[0], abs=tolerance)


def test_the_scenarios_train(folder):
    """Or equal weights would say nothing."""
    start = load_file(folder / "one step-1.safetensors")
    other = load_file(folder / "uneven-1.safetensors")
    assert max(float((start[key] - other[key]).abs().max()) for key in start) > 1e-3


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return make_job(tmp_path_factory.mktemp("job"))


def test_the_command(job, tmp_path, monkeypatch):
    """`qpeft train` on two ranks: rank 0 alone speaks and writes; resumed after its last checkpoint was cut short."""
    monkeypatch.setenv("QPEFT_CACHE", str(tmp_path / "cache"))
    output = tmp_path / "adapter"
    options = [
        "-m",
        "qpeft_ext.cli",
        "train",
        "--base-model",
        job / "lm",
        "--data",
        job / "data",
        "--output",
        output,
        "--rank",
        8,
        "--max-steps",
        3,
        "--device",
        "cpu",
        "--queries-per-group",
        2,
        "--save-steps",
        1,
        "--run",
        job / "data" / "run.trec",
    ]
    first, second = finish(on_ranks(2, *options))
    assert "wrote the adapter to" in first and second == ""
    whole = load_file(output / "adapter_model.safetensors")
    names = {path.name for path in (output / "checkpoints" / "checkpoint-3").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "complete.json"} < names
    (output / "adapter_model.safetensors").unlink()
    (output / "checkpoints" / "checkpoint-3" / "complete.json").unlink()
    finish(on_ranks(2, *options, "--resume"))
    resumed = load_file(output / "adapter_model.safetensors")
    for key in whole:
        torch.testing.assert_close(resumed[key], whole[key], rtol=0, atol=1e-5)
    assert len(qpeft.Reranker.from_pretrained(output).rank("tides", ["the sea", "the moon"])) == 2
