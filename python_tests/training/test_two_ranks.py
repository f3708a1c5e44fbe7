"""Training on two ranks (two gloo processes on the CPU) is training on one device with the same global batch."""

import json

import pytest
import torch
from jobs.processes import Forked
from jobs.tiny_job import make_job
from safetensors.torch import load_file

import qpeft_ext as qpeft
from qpeft_ext.cli import main

pytest.importorskip("peft", reason="the extra qpeft_ext[train] is not installed")
from jobs.two_ranks import SCENARIOS, on_ranks, train_all  # noqa: E402

pytestmark = pytest.mark.slow


def finish(processes: list[Forked]) -> list[str]:
    """What each printed; all must succeed."""
    said = [process.end() for process in processes]
    for code, _, err in said:
        assert code == 0, err[-3000:]
    return [out for _, out, _ in said]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    finish([process for world in (1, 2) for process in on_ranks(world, lambda: train_all(folder))])
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

    def train(*more: str) -> int:
        return main([str(option) for option in (*options, *more)])

    first, second = finish(on_ranks(2, train))
    assert "wrote the adapter to" in first and second == ""
    whole = load_file(output / "adapter_model.safetensors")
    names = {path.name for path in (output / "checkpoints" / "checkpoint-3").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "complete.json"} < names
    (output / "adapter_model.safetensors").unlink()
    (output / "checkpoints" / "checkpoint-3" / "complete.json").unlink()
    finish(on_ranks(2, lambda: train("--resume")))
    resumed = load_file(output / "adapter_model.safetensors")
    for key in whole:
        torch.testing.assert_close(resumed[key], whole[key], rtol=0, atol=1e-5)
    assert len(qpeft.Reranker.from_pretrained(output).rank("tides", ["the sea", "the moon"])) == 2
