"""What is uploaded to the Hub, by a trainer and by a model; the uploads themselves are replaced."""

from __future__ import annotations

import shutil
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families.tiny import tiny_lm, tiny_tokenizer
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from training.tiny_training import tiny_model, trainer, weights

import qpeft_ext as qpeft

peft = pytest.importorskip("peft", reason="the extra qpeft_ext[train] is not installed")

pytestmark = pytest.mark.slow

ADAPTER = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "lm_adapter/README.md",
    "lm_adapter/adapter_config.json",
    "lm_adapter/adapter_model.safetensors",
}


class Hub:
    """Takes the place of the Hub: a folder for each repository, and what every upload had.

    Attributes: busy: whether uploads in the background never end.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.busy = folder, False
        self.created: list[dict] = []
        self.uploads: list[tuple[str, set[str], str | None]] = []  # message, files, token

    def create_repo(self, api, repo_id, token=None, **options):
        self.created.append(options | {"token": token or api.token})
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(
        self, api, *, repo_id, folder_path, path_in_repo="", commit_message="", token=None, run_as_future=False,
        ignore_patterns=None, revision=None,
    ):  # fmt: skip
        source = Path(folder_path)
        files = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
        sent = set(filter_repo_objects(files, ignore_patterns=ignore_patterns))
        for name in sent:
            target = self.folder / path_in_repo / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target)
        self.uploads.append(
            (commit_message, {f"{path_in_repo}/{name}".lstrip("/") for name in sent}, token or api.token)
        )
        done = SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/{len(self.uploads)}")
        if not run_as_future:
            return done
        job: Future = Future()
        if not self.busy:
            job.set_result(done)
        return job


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(HfApi, "create_repo", lambda api, *args, **given: hub.create_repo(api, *args, **given))
    monkeypatch.setattr(HfApi, "upload_folder", lambda api, **given: hub.upload_folder(api, **given))
    return hub


def lm_with_lora():
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(tiny_lm("llama"), lora)


def pushing(folder, **args):
    settings = {"save_strategy": "steps", "save_steps": 1, "hub_model_id": "me/mine", "hub_token": "secret token"}
    return trainer(folder, tiny_model(lm_with_lora()), push_to_hub=True, **settings | args)


def test_every_push_has_the_whole_adapter_and_nothing_else(tmp_path, hub):
    run = pushing(tmp_path / "run")
    run.train()
    run.push_to_hub()
    assert [message for message, *_ in hub.uploads] == [
        "Training in progress, step 1",
        "Training in progress, step 2",
        "End of training",
    ]
    for _, files, token in hub.uploads:
        assert files == ADAPTER and token == "secret token"
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert b"secret token" not in path.read_bytes(), path
    loaded = qpeft.QPeftModel.from_pretrained(hub.folder, tiny_lm("llama"), tiny_tokenizer(), is_trainable=True)
    assert all(torch.equal(tensor, weights(run.model)[name]) for name, tensor in weights(loaded).items())


@pytest.mark.parametrize(
    "strategy, folders",
    [("checkpoint", ["last-checkpoint"] * 2), ("all_checkpoints", ["checkpoint-1", "checkpoint-2"]), ("end", [])],
)
def test_a_checkpoint_on_the_hub_can_be_resumed_from(tmp_path, hub, strategy, folders):
    run = pushing(tmp_path / "run", hub_strategy=strategy)
    run.train()
    states = {"complete.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    checkpoints = [files for message, files, _ in hub.uploads if message.endswith("checkpoint")]
    assert checkpoints == [{f"{folder}/{name}" for name in ADAPTER | states} for folder in folders]
    assert len(hub.uploads) == 2 * len(folders)
    if folders:
        again = pushing(tmp_path / "again", max_steps=3)
        again.train(str(hub.folder / folders[-1]))
        assert again.state.global_step == 3


def test_a_checkpoint_that_is_being_uploaded_is_kept(tmp_path, hub):
    hub.busy = True
    run = pushing(tmp_path / "run", hub_strategy="checkpoint", max_steps=4, save_total_limit=1)
    run._finish_current_push = lambda: None  # the training waits for it at its end
    run.train()
    assert {message for message, *_ in hub.uploads} == {
        "Training in progress, step 1",
        "Training in progress, step 1, checkpoint",
    }
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-4"}


def test_a_model_is_pushed_with_the_token_that_is_given(hub):
    url = tiny_model(lm_with_lora()).push_to_hub("me/mine", token="secret token", private=True)
    assert hub.created == [{"exist_ok": True, "private": True, "token": "secret token"}]
    ((_, files, token),) = hub.uploads
    assert files == ADAPTER and token == "secret token" and url == "https://hub/me/mine/commit/1"
