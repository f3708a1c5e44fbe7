"""Training of one cell: the model that a method ranks with, trained now or by an earlier run."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..utils.files import write_text
from .cells import ADAPTER, CHECKPOINTS, TRAINED, Cell
from .data import CollectionData
from .methods import build_model
from .plan import Plan

if TYPE_CHECKING:
    from .prefixes import Prefixes


def trained_model(
    plan: Plan, cell: Cell, data: CollectionData, device: str, prefixes: Callable[[Any], Prefixes]
) -> tuple[Any, dict[str, Any]]:
    """The model of a cell, trained, and the facts about it: trained parameters, seconds, peak memory.

    Args: data: of the cell's collection.  prefixes: model -> those that it is trained with.
    An adapter that is there whole is loaded: its folder holds none with other settings. One that was taken away is
    trained again.
    """
    from ..adapters.files import load_weights_into

    model = build_model(plan, cell.method, cell.seed, device)
    trainable, total = model.get_nb_trainable_parameters()
    facts: dict[str, Any] = {"parameters": {"trainable": trainable, "all": total}}
    if not cell.method.preset.trained:
        facts["parameters"]["trainable"] = 0  # hard clues have a module that is never trained
        return model, facts
    adapter, there = cell.folder / ADAPTER, cell.read(TRAINED)
    if there and adapter.is_dir():
        load_weights_into(model, adapter)
        return model.eval(), facts | {"training": there}
    (cell.folder / TRAINED).unlink(missing_ok=True)  # of an adapter that is not there: the new one is not whole yet
    shutil.rmtree(adapter, ignore_errors=True)
    examples = data.examples(cell.method.examples, cell.method.training, cell.seed)
    facts["training"] = _train(model, cell, examples, device, prefixes(model))
    shutil.rmtree(cell.folder / CHECKPOINTS, ignore_errors=True)
    model.save_pretrained(adapter)
    # last: the adapter is whole
    write_text(cell.folder / TRAINED, json.dumps(facts["training"], indent=1) + "\n", follow=False)
    return model, facts


def _train(model, cell: Cell, examples: list[dict], device: str, prefixes: Prefixes) -> dict[str, Any]:
    """Train in place; linear schedule, a tenth of the steps warms up."""
    from transformers import TrainingArguments

    from ..training.progress import TrainingBar
    from ..training.trainer import QPeftTrainer
    from .cost import PeakMemory

    method = cell.method
    size = method.training.queries_per_step
    steps = max(1, round(len(examples) * method.training.epochs / size))
    arguments = TrainingArguments(
        output_dir=str(cell.folder / CHECKPOINTS), per_device_train_batch_size=size, max_steps=steps,
        warmup_steps=steps // 10, learning_rate=method.learning_rate, lr_scheduler_type="linear", save_strategy="no",
        report_to="none", logging_steps=max(1, steps // 20), seed=cell.seed, use_cpu=device == "cpu",
    )  # fmt: skip
    trainer = QPeftTrainer(model=model, args=arguments, train_dataset=examples, cache=prefixes.cache)
    TrainingBar.install(trainer, cell.name, "loss")
    started = time.perf_counter()
    with PeakMemory(model.device) as peak:
        trainer.train()
    seconds = time.perf_counter() - started
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "steps": steps,
        "queries": len(examples),
        "seconds": seconds,
        "peak_bytes": peak.bytes,
        "prefixes_from_index": prefixes.from_index,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
    }
