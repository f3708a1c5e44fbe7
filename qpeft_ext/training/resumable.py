"""How checkpoints differ from those of transformers' Trainer: an adapter's own files, in folders marked as complete."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from torch import nn
from transformers import Trainer, TrainerState
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress

from ..adapters.files import load_weights_into, write_card
from ..config import QPeftConfig
from ..model import QPeftModel
from ..utils.memory import raise_if_out_of_memory
from .checkpoints import last_complete, mark_complete, rotate, why_incomplete

logger = logging.getLogger(__name__)


class ResumableTrainer(Trainer):
    """A `Trainer` of a `QPeftModel` that can be killed at any moment and resumed.

    A checkpoint holds the adapter's files and the state of the training, nothing pickled. It is marked as complete
    when all its files are written, and only then is it pushed to the Hub, and are older checkpoints deleted.
    """

    model: QPeftModel
    push_in_progress: Any = None
    _pushed: Path | None = None  # the checkpoint of that push

    def _checkpoint_to_resume(self, asked: str | bool | None) -> str | None:
        """The folder that ``train(resume_from_checkpoint)`` begins from.

        Raises: ValueError if it is not a complete checkpoint, or with True if there is none; and for one that only the
            arguments name, which `Trainer` leaves to the caller.
        """
        if asked is None and self.args.resume_from_checkpoint:
            raise ValueError(
                "QPeftTrainer: resume_from_checkpoint of TrainingArguments is for the script that calls "
                "train(resume_from_checkpoint=...), and was not given to it; give it, or False to begin anew"
            )
        if asked is True:
            return _expect_state(self._last_complete())
        if not asked:
            if (earlier := last_complete(self._output_dir)[0]) is not None:
                logger.warning("%s is of an earlier run: if this one is killed, resuming would find it", earlier)
            return None
        if reason := why_incomplete(asked):
            raise ValueError(f"cannot resume from {asked}: {reason}; pass True to take the last complete checkpoint")
        return _expect_state(asked)

    def _last_complete(self) -> str:
        folder, skipped = last_complete(self._output_dir)
        for path, reason in skipped.items():
            logger.warning("%s is passed over: %s", path, reason)
        if folder is None:
            raise ValueError(
                f"resume_from_checkpoint=True: there is no complete checkpoint in {self._output_dir}; "
                f"name its folder, or leave it out to train from the beginning"
            )
        return str(folder)

    @property
    def _output_dir(self) -> str:
        assert self.args.output_dir is not None  # transformers fills it in
        return self.args.output_dir

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write, then mark as complete, then delete older ones: at any moment one can be resumed from."""
        run_dir = Path(self._get_output_dir(trial))
        folder = run_dir / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.exists():
            shutil.rmtree(folder)  # cut short by a kill, or of an earlier run: none of its files may survive
        self.accelerator.wait_for_everyone()
        args, limit, pushes = self.args, self.args.save_total_limit, self.args.push_to_hub
        args.save_total_limit, args.push_to_hub = None, False
        try:
            super()._save_checkpoint(model, trial)
        except RuntimeError as error:
            if not re.search("iostream|inline_container|PytorchStreamWriter|unexpected pos", str(error)):
                raise
            raise OSError(
                f"cannot write the checkpoint {folder} (File too large, or no space left); make room for it"
            ) from None
        finally:
            args.save_total_limit, args.push_to_hub = limit, pushes
        self.accelerator.wait_for_everyone()
        if args.should_save:
            mark_complete(folder)
        if pushes:
            self._push_from_checkpoint(str(folder))
        if args.should_save:
            best = self.state.best_model_checkpoint
            uploading = self._pushed if self._is_pushing() else None
            rotate(run_dir, limit, {folder, *(Path(path) for path in (best, uploading) if path)})

    def _is_pushing(self) -> bool:
        return self.push_in_progress is not None and not self.push_in_progress.is_done()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload all files of the adapter and, as ``hub_strategy`` says, the checkpoint; like `Trainer`.

        That one leaves out what is in sub-folders (``lm_adapter``), and uploads the pickled arguments, with the token.
        """
        args, strategy = self.args, self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        if self._is_pushing() and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        self._finish_current_push()  # which reads the files that are written now
        self._save()
        message = f"Training in progress, step {self.state.global_step}"
        api = HfApi(token=args.hub_token)  # one, which uploads one after the other
        to: dict[str, Any] = {"repo_id": self.hub_model_id, "revision": args.hub_revision, "run_as_future": True}
        others = ["_*", f"{PREFIX_CHECKPOINT_DIR}-*"]
        jobs: Any = [
            api.upload_folder(folder_path=self._output_dir, commit_message=message, ignore_patterns=others, **to)
        ]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            to["path_in_repo"] = (
                "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else Path(checkpoint_folder).name
            )
            message = f"{message}, checkpoint"
            jobs.append(api.upload_folder(folder_path=checkpoint_folder, commit_message=message, **to))
        self.push_in_progress, self._pushed = PushInProgress(jobs), Path(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the adapter's own files (`QPeftModel.save_pretrained`); `Trainer` adds its state."""
        if self.args.should_save:
            self.model.save_pretrained(output_dir or self._output_dir)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the adapter's own model card into ``output_dir``, as `save_pretrained` does.

        Args:
            args, kwargs: of `Trainer`, for its own card; not used.
        """
        if self.args.should_save:
            write_card(self.model, self._output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        then = QPeftConfig.from_pretrained(resume_from_checkpoint).to_dict()
        now = self.model.qpeft_config.to_dict()
        changed = [
            f"{name} {then[name]!r} -> {now[name]!r}"
            for name in now
            if then[name] != now[name] and not name.startswith("base_model")
        ]
        if changed:
            logger.warning("the run is resumed with other options: %s", ", ".join(changed))
        load_weights_into(self.model, resume_from_checkpoint)
        size = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME)).train_batch_size
        if size not in (None, self.args.train_batch_size):
            logger.warning(
                "the run is resumed with other options: train_batch_size %s -> %s", size, self.args.train_batch_size
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        given = self._rates()
        with _state_of(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        for name, values in self._rates().items():
            if values != given[name]:
                logger.warning(
                    "the run is resumed with the %s of the checkpoint, %s, not with %s; to change it, begin from the "
                    "weights: QPeftModel.from_pretrained(folder, is_trainable=True)",
                    name.removeprefix("initial_"),
                    max(values),
                    max(given[name]),
                )

    def _rates(self) -> dict[str, list[float]]:
        """The numbers of the optimizer that loading its state replaces, for each group of parameters."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return {name: [g[name] for g in groups if name in g] for name in ("initial_lr", "weight_decay")}

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Do what `Trainer` does, but no step of a training that has all its steps: it would do one before it looks."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _state_of(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None  # `Trainer` calls this only where there is one
        logger.info("loading the best adapter, %s (%s)", best, self.state.best_metric)
        load_weights_into(self.model, best)


def _expect_state(checkpoint: str) -> str:
    """Return the folder. Raises: ValueError for one of ``save_only_model``: optimizer and schedule would begin anew."""
    if not (Path(checkpoint) / SCHEDULER_NAME).is_file():
        raise ValueError(
            f"cannot resume from {checkpoint}: it was saved with save_only_model=True, without the state of the "
            "training; go on from its weights, QPeftModel.from_pretrained(folder, is_trainable=True)"
        )
    return checkpoint


@contextmanager
def _state_of(checkpoint: str | None) -> Iterator[None]:
    """Turn what torch raises for a damaged state, or one with more than tensors and numbers, into one line."""
    try:
        yield
    except Exception as error:
        raise_if_out_of_memory(error)
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise ValueError(
            f"{checkpoint}: the state of the training cannot be read ({reason}); remove the folder to "
            "resume from an earlier one"
        ) from None
