"""The trained model of a result: trained now, or by an earlier process."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from ..utils.files import write_text
from ..utils.small_files import read_json
from .cells import ADAPTER, CHECKPOINTS, TRAINED, Cell
from .data import CollectionData
from .models import build_model
from .plan import Plan

if TYPE_CHECKING:
    from ..model import QPeftModel
    from .prefixes import Prefixes


def trained_model(
    plan: Plan, cell: Cell, data: CollectionData, device: str, prefixes: Callable[[QPeftModel], Prefixes]
) -> tuple[QPeftModel, dict[str, Any]]:
    """Build the model of a result and train it, or load its adapter if the result's folder has a complete one.

    Args:
        plan: the plan.
        cell: the result; its folder has no adapter with other settings.
        data: data of its collection.
        device: device of the LM.
        prefixes: returns the prefixes that a model is trained with.

    Returns: the model, and facts about it: trained parameters, seconds, peak memory.
    """
    from ..adapters.files import load_weights_into

    model = build_model(plan, cell.method, cell.seed, device)
    trainable, total = model.get_nb_trainable_parameters()
    facts: dict[str, Any] = {"parameters": {"trainable": trainable, "all": total}}
    if not cell.method.preset.trained:
        facts["parameters"]["trainable"] = 0  # hard clues have a module, which is never trained
        return model, facts
    adapter, there = cell.folder / ADAPTER, cell.read(TRAINED)
    if there and adapter.is_dir():
        load_weights_into(model, adapter)
        return model.eval(), facts | {"training": there}
    (cell.folder / TRAINED).unlink(missing_ok=True)  # it says that the adapter is complete
    shutil.rmtree(adapter, ignore_errors=True)
    examples = data.examples(cell.method.examples, cell.method.training, cell.seed)
    facts["training"] = _train(model, cell, examples, prefixes(model))
    shutil.rmtree(cell.folder / CHECKPOINTS, ignore_errors=True)
    model.save_pretrained(adapter)
    # written last, since it says that the adapter is complete
    write_text(cell.folder / TRAINED, json.dumps(facts["training"], indent=1) + "\n", follow=False)
    return model, facts


def _train(model: QPeftModel, cell: Cell, examples: list[dict], prefixes: Prefixes) -> dict[str, Any]:
    """Train a model in place, on a linear schedule with a warm-up of a tenth of the steps, and resume what was killed.

    Returns: facts about it; ``peak_bytes`` are those of the last process.
    """
    from ..training.checkpoints import last_complete
    from ..training.fit import fit
    from .cost import PeakMemory

    method = cell.method
    assert method.learning_rate is not None  # `read_plan` checks it
    size = method.training.queries_per_step
    steps = max(1, round(len(examples) * method.training.epochs / size))
    folder = cell.folder / CHECKPOINTS
    resume = last_complete(folder)[0] is not None
    clock = _Clock(folder / "seconds.json", resume)
    with PeakMemory(model.device) as peak:
        done = fit(
            model,
            examples,
            folder,
            learning_rate=method.learning_rate,
            batch_size=size,
            max_steps=steps,
            warm_up=steps // 10,
            log_every=max(1, steps // 20),
            seed=cell.seed,
            bar=(cell.name, "loss"),
            cache=prefixes.cache,
            save_every=max(1, steps // 10),
            save_total_limit=1,
            resume=resume,
            callbacks=[clock],
        )
    losses = [entry["loss"] for entry in done.trainer.state.log_history if "loss" in entry]
    return {
        "steps": steps,
        "queries": len(examples),
        "seconds": clock.seconds_before + done.seconds,
        "peak_bytes": peak.bytes,
        "prefixes_from_index": prefixes.from_index,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
    }


class _Clock(TrainerCallback):
    """Keeps the wall time of a training in a file beside its checkpoints.

    Args:
        file: that file.
        resume: whether the training is resumed, so that the file's time counts.

    Attributes: seconds_before: wall time up to the checkpoint that the training began from.
    """

    def __init__(self, file: Path, resume: bool) -> None:
        self.file, self.started = file, 0.0
        self.seconds_before: float = read_json(file) if resume and file.is_file() else 0.0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.started = time.perf_counter()

    def on_save(self, args, state, control, **kwargs) -> None:
        write_text(self.file, f"{self.seconds_before + time.perf_counter() - self.started}\n", follow=False)
