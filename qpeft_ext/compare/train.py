"""The trained model of a result: trained now, or by an earlier process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..utils.files import write_text
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
    """Train a model in place, on a linear schedule with a warm-up of a tenth of the steps. Returns: facts about it."""
    from ..training.fit import fit
    from .cost import PeakMemory

    method = cell.method
    assert method.learning_rate is not None  # `read_plan` checks it
    size = method.training.queries_per_step
    steps = max(1, round(len(examples) * method.training.epochs / size))
    with PeakMemory(model.device) as peak:
        done = fit(
            model,
            examples,
            cell.folder / CHECKPOINTS,
            learning_rate=method.learning_rate,
            batch_size=size,
            max_steps=steps,
            warm_up=steps // 10,
            log_every=max(1, steps // 20),
            seed=cell.seed,
            bar=(cell.name, "loss"),
            cache=prefixes.cache,
        )
    losses = [entry["loss"] for entry in done.trainer.state.log_history if "loss" in entry]
    return {
        "steps": steps,
        "queries": len(examples),
        "seconds": done.seconds,
        "peak_bytes": peak.bytes,
        "prefixes_from_index": prefixes.from_index,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
    }
