"""Train a model on examples in one call, with the settings of `TrainingArguments` that all our trainings share."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from ..model import QPeftModel
from ..prefixes.cache import DocumentCache
from .progress import TrainingBar
from .trainer import QPeftTrainer


@dataclass(frozen=True)
class Fit:
    """A finished training.

    Attributes:
        trainer: the trainer, which can evaluate the trained model.
        seconds: wall time of the training, evaluations in between included.
        before: what an evaluation said before the first step; empty if there was none.
    """

    trainer: QPeftTrainer
    seconds: float
    before: dict[str, float] = field(default_factory=dict)


def fit(
    model: QPeftModel,
    examples: Sequence | Iterable,
    folder: str | Path,
    *,
    learning_rate: float,
    batch_size: int,
    max_steps: int = -1,
    warm_up: float = 0.0,
    dev: Sequence | Iterable | None = None,
    evaluate_first: bool = False,
    save_every: int | None = None,
    log_every: int = 10,
    seed: int = 0,
    bar: tuple[str, str] | None = None,
    cache: DocumentCache | None = None,
    deterministic: bool = False,
    truncate_queries: bool = False,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    **arguments: Any,
) -> Fit:
    """Train a model in place.

    Args:
        model: `QPeftModel`.
        examples: as for `QPeftTrainer`.
        folder: where checkpoints go.
        learning_rate: its peak; the schedule is linear unless ``lr_scheduler_type`` is given.
        batch_size: queries that a device reads at once.
        max_steps: steps of the optimiser; −1 for ``num_train_epochs`` passes over the examples.
        warm_up: steps in which the learning rate rises; below 1 a share of all steps.
        dev: examples for evaluation: with every checkpoint, or after each epoch without checkpoints.
        evaluate_first: whether to evaluate before the first step too.
        save_every: steps between two checkpoints; the best one on ``dev`` is loaded at the end. None writes none.
        log_every: steps between two entries in the log.
        seed: decides the order of the examples and the dropout.
        bar: a name and a measure in the logs, for one progress bar in place of the log lines.
        cache, deterministic, truncate_queries: as for `QPeftTrainer`.
        resume: whether to resume from the last complete checkpoint in ``folder``.
        callbacks: of the trainer.
        arguments: of `TrainingArguments`, which win over the settings here.
    Returns: `Fit`.
    Raises: as `QPeftTrainer`.
    """
    evaluates = "no" if not dev else "epoch" if save_every is None else "steps"
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "learning_rate": learning_rate,
        "per_device_train_batch_size": batch_size,
        "max_steps": max_steps,
        "lr_scheduler_type": "linear",
        "warmup_steps": int(warm_up) if warm_up >= 1 else warm_up,
        "eval_strategy": evaluates,
        "eval_steps": save_every,
        "save_strategy": "no" if save_every is None else "steps",
        "save_steps": save_every or 500,
        "load_best_model_at_end": evaluates == "steps",
        "logging_steps": log_every,
        "report_to": "none",
        "seed": seed,
        "use_cpu": model.device.type == "cpu",
    }
    trainer = QPeftTrainer(
        model=model,
        args=TrainingArguments(**settings | arguments),
        train_dataset=examples,
        eval_dataset=dev,
        cache=cache,
        deterministic=deterministic,
        truncate_queries=truncate_queries,
        callbacks=list(callbacks),
    )
    if bar is not None:
        TrainingBar.install(trainer, *bar)
    before = trainer.evaluate() if evaluate_first else {}
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume or None)
    return Fit(trainer, time.perf_counter() - started, before)
