"""`qpeft compare`: a training that was ended resumes from its last checkpoint."""

from pathlib import Path

import pytest
import torch
from jobs.compare_job import METHODS, compare, results, write_plan
from safetensors.torch import load_file

from qpeft_ext import QPeftTrainer
from qpeft_ext.compare.plan import file_name

pytest.importorskip("peft")
pytest.importorskip("bm25s")
pytest.importorskip("ir_measures")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def done(job, tmp_path_factory):
    """Plan and results of two trained methods, which nothing happened to."""
    folder = tmp_path_factory.mktemp("done")
    plan = write_plan(folder / "plan.yaml", job, METHODS)
    assert compare(plan, job, folder / "out", "--method", "LoRA", "--method", "Q-PEFT-A") == 0
    return folder


@pytest.mark.parametrize("method", ["LoRA", "Q-PEFT-A"])
def test_a_training_is_resumed(done, job, tmp_path, monkeypatch, method):
    """What ends a training after its first checkpoint costs no step, and the adapter is the same."""
    out, steps = tmp_path / "out", []
    some = ("--method", method)
    step = QPeftTrainer.training_step

    def counted(trainer, *args):
        steps.append(trainer.state.global_step)
        return step(trainer, *args)

    def stop(clock, args, state, control, **kwargs):
        clock.file.write_text("1000")
        raise KeyboardInterrupt

    monkeypatch.setattr(QPeftTrainer, "training_step", counted)
    with monkeypatch.context() as stopped:
        stopped.setattr("qpeft_ext.compare.train._Clock.on_save", stop)
        assert compare(done / "plan.yaml", job, out, *some) == 130
    assert steps == [0] and not results(out).keys() & {(method, 0)}
    assert compare(done / "plan.yaml", job, out, *some) == 0
    assert steps[:3] == [0, 1, 0]  # the second step of the first seed, the first step of the second seed
    found, cell = results(out)[method, 0], Path("tiny", file_name(method), "seed-0")
    assert 1000 < found["training"]["seconds"] < 2000 and found["training"]["steps"] == 2
    assert found["training"]["first_loss"] == pytest.approx(results(done / "out")[method, 0]["training"]["first_loss"])
    weights = sorted(path.relative_to(out) for path in (out / cell).rglob("*.safetensors"))
    assert weights
    for name in weights:
        expected = load_file(done / "out" / name)
        for key, value in load_file(out / name).items():
            assert torch.allclose(value, expected[key], atol=1e-6), (name, key)
    assert not (out / cell / "checkpoints").exists()
