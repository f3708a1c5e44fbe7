"""Checkpoints: the best one, resuming, rotation, and trainings that are killed."""

from __future__ import annotations

import os

import pytest
import torch
import transformers
from families.tiny import tiny_lm, tiny_tokenizer
from jobs.kill_and_resume import kill_and_resume
from training.tiny_training import EACH_STEP, EXAMPLES, assert_close, tiny_model, trainer, weights

import qpeft_ext as qpeft
from qpeft_ext.training.checkpoints import MANIFEST, last_complete, mark_complete, rotate, why_incomplete

pytestmark = pytest.mark.slow


def scripted(run, losses):
    """A trainer whose evaluation loss is ``losses[step]``."""
    run._measures = lambda table, _: torch.tensor([[losses[run.state.global_step], 1, 1]]).repeat(len(table), 1)
    return run


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    run = trainer(tmp_path, dev=EXAMPLES, max_steps=4, save_total_limit=2, **EACH_STEP)
    scripted(run, {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.0}).train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    best, last = (
        qpeft.QPeftModel.from_pretrained(tmp_path / name, tiny_lm("llama"), tiny_tokenizer())
        for name in ("checkpoint-2", "checkpoint-4")
    )
    ours = dict(run.model.clues.named_parameters())
    assert_close(dict(best.clues.named_parameters()), ours, 0)
    assert any(not torch.equal(w, ours[name]) for name, w in last.clues.named_parameters())


def test_patience_survives_a_restart(tmp_path):
    losses = {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 5.0}

    def run(resume):
        early = transformers.EarlyStoppingCallback(early_stopping_patience=2)
        one = trainer(tmp_path, dev=EXAMPLES, callbacks=[early], max_steps=5, **EACH_STEP)
        scripted(one, losses).train(resume)
        return one.state.global_step

    assert run(None) == 3
    assert run(str(tmp_path / "checkpoint-2")) == 3


def test_checkpoints_hold_no_pickled_objects(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert names == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        MANIFEST,
    }
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(tmp_path / "checkpoint-2" / name, weights_only=True)


def test_resuming_says_what_it_passes_over(tmp_path, caplog):
    run = trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
    run.train()
    (tmp_path / "checkpoint-3" / "optimizer.pt").write_bytes(b"half")
    (tmp_path / "checkpoint-2" / MANIFEST).unlink()
    again = trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match="cannot resume from .*checkpoint-3: optimizer.pt has 4 bytes, expected"):
        again.train(str(tmp_path / "checkpoint-3"))
    again.train(resume_from_checkpoint=True)
    assert "checkpoint-3 is passed over: optimizer.pt has 4 bytes" in caplog.text
    assert "checkpoint-2 is passed over: it has no complete.json" in caplog.text
    assert not why_incomplete(tmp_path / "checkpoint-3")
    assert_close(weights(again.model), weights(run.model), 1e-5)


@pytest.mark.parametrize("cut", [False, True])
def test_resuming_without_a_checkpoint_is_an_error(tmp_path, cut):
    if cut:  # by a kill in the middle of the first save
        (tmp_path / "checkpoint-1").mkdir()
    run = trainer(tmp_path)
    before = {name: weight.clone() for name, weight in weights(run.model).items()}
    with pytest.raises(ValueError, match=f"no complete checkpoint in {tmp_path}; name its folder"):
        run.train(resume_from_checkpoint=True)
    assert_close(weights(run.model), before, 0)


def test_resuming_with_another_model_is_an_error_and_with_other_options_a_warning(tmp_path, caplog):
    trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    trainer(tmp_path, tiny_model(margin=0.5)).train(True)
    assert "other options: margin 0.0 -> 0.5" in caplog.text
    with pytest.raises(ValueError, match="unknown keys|must have shape"):
        trainer(tmp_path, tiny_model(clues="top_k")).train(True)


def test_resuming_a_training_that_has_all_its_steps_trains_no_more(tmp_path, caplog):
    """A kill may come between the last checkpoint and what the caller saves then. The epoch is not at its end."""
    settings = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    run = trainer(tmp_path, max_steps=2, **settings)
    run.train()
    assert not caplog.records
    for max_steps in (2, 1):
        again = trainer(tmp_path, max_steps=max_steps, **settings)
        again.train(True)
        assert again.state.global_step == 2 and "checkpoint-2 has all 2 steps: nothing more" in caplog.text
        assert_close(weights(again.model), weights(run.model), 0)
        caplog.clear()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}


def test_a_checkpoint_that_only_the_arguments_name_is_an_error(tmp_path):
    """`Trainer` leaves it to the caller, and would begin anew."""
    trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    run = trainer(tmp_path, max_steps=3, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(
        ValueError, match="is for the script that calls train.*, and was not given to it; give it, or F"
    ):
        run.train()
    run.train(run.args.resume_from_checkpoint)
    assert run.state.global_step == 3 and run.counts.queries_read == 4
    run.train(False)
    assert run.counts.queries_read == 12


def test_resuming_says_which_numbers_are_those_of_the_checkpoint(tmp_path, caplog):
    trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    again = trainer(tmp_path, max_steps=3, learning_rate=0.5, weight_decay=0.1, per_device_train_batch_size=8)
    again.train(True)
    (group, *_) = again.optimizer.param_groups
    assert (
        group["initial_lr"] == 0.01
        and f"with the lr of the checkpoint, {group['initial_lr']}, not with 0.5" in caplog.text
    )
    assert "with the weight_decay of the checkpoint, 0.0, not with 0.1" in caplog.text
    assert "other options: train_batch_size 4 -> 8" in caplog.text
    caplog.clear()
    trainer(tmp_path, max_steps=4).train(True)
    assert not caplog.records


def test_resuming_without_the_state_of_the_training_is_an_error(tmp_path):
    trainer(tmp_path, save_only_model=True, save_strategy="steps", save_steps=1).train()
    for folder in (True, str(tmp_path / "checkpoint-1")):
        with pytest.raises(ValueError, match="saved with save_only_model=True, .* is_trainable=True"):
            trainer(tmp_path, max_steps=4).train(folder)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_lack_of_memory_is_not_a_damaged_checkpoint(tmp_path, monkeypatch, error):
    """Otherwise the user is told to remove a folder that is whole."""
    trainer(tmp_path, save_strategy="steps", save_steps=1).train()

    def fail(*arguments, **keywords):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(type(error)) as raised:
        trainer(tmp_path, max_steps=4).train(True)
    assert raised.value is error


def test_the_model_card_is_the_adapters(tmp_path):
    run = trainer(tmp_path)
    run.save_model()
    card = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").unlink()
    run.create_model_card(model_name="mine")  # as `Trainer.push_to_hub` calls it
    assert (tmp_path / "README.md").read_text() == card


def test_rotation_keeps_the_newest_whole_ones(tmp_path):
    for step in (5, 10, 15, 20):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "file").write_text("x")
        if step != 20:
            mark_complete(folder)
    assert last_complete(tmp_path)[0].name == "checkpoint-15"
    rotate(tmp_path, 2, {tmp_path / "checkpoint-5", tmp_path / "checkpoint-15"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-15", "checkpoint-5"]
    rotate(tmp_path, None, set())
    assert len(list(tmp_path.iterdir())) == 2


def test_rotation_goes_by_age(tmp_path):
    """The folder may hold checkpoints of an earlier run that had got further."""
    for age, step in enumerate((20, 5, 10)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        mark_complete(folder)
        os.utime(folder / MANIFEST, (age, age))
    rotate(tmp_path, 2, {tmp_path / "checkpoint-10"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-5"]


def test_a_lora_in_the_lm_is_trained_along(tmp_path):
    peft = pytest.importorskip("peft")

    def wrapped():
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        return tiny_model(peft.get_peft_model(tiny_lm("llama"), lora))

    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "deterministic": True}
    run = trainer(tmp_path, wrapped(), **settings)
    run.train()
    after = weights(run.model)
    assert any("lora_B" in name and bool(w.any()) for name, w in after.items())
    assert (tmp_path / "checkpoint-2" / "lm_adapter" / "adapter_model.safetensors").is_file()
    resumed = trainer(tmp_path, wrapped(), **settings)
    resumed.train(str(tmp_path / "checkpoint-2"))
    assert_close(weights(resumed.model), after, 0)


SCENARIOS = [
    "another run",
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    MANIFEST,
    "rotation",
    "first save",
    "random 0",
    "random 1",
    "with a cache",
]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """What becomes of trainings that are killed in the middle of a file, or at any moment, and then resumed."""
    return kill_and_resume(tmp_path_factory.mktemp("killed"))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed_and_resumed_ends_the_same(killed, scenario):
    result = killed[scenario]
    assert result["difference"] <= 1e-5
    assert result["bit_equal"] or scenario == "with a cache"
    assert scenario == "another run" or result["restarts"] > 0 or scenario.startswith("random")


def test_the_kills_came(killed):
    assert sum(result["restarts"] for name, result in killed.items() if name.startswith("random")) > 0
