"""The adapters that the demo compares: the packaged one, and those that it trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.words import counted
from .settings import BEST, Settings

if TYPE_CHECKING:
    from ..model import QPeftModel

# benchmarks/quality/package_adapter.py made both
ADAPTER = Path(__file__).parent / "adapter"  # of the packaged LM
PRETRAINED_ADAPTER = Path(__file__).parent / "adapter_smollm2"


@dataclass(frozen=True)
class Packaged:
    """An adapter that comes with the package.

    Attributes:
        folder: where it is.
        trained_on: its training queries, in words.
    """

    folder: Path
    trained_on: str


def load_packaged(adapter: Packaged, lm, tokenizer) -> tuple[QPeftModel, str]:
    """Load a packaged adapter. Returns: the model, and a line about it."""
    from ..model import QPeftModel

    adapted = QPeftModel.from_pretrained(adapter.folder, lm, tokenizer).eval()
    added = sum(p.numel() for p in adapted.parameters()) - sum(p.numel() for p in lm.parameters())
    return adapted, (
        f"{BEST}: comes with the package ({added:,} parameters), trained on {adapter.trained_on}; "
        "the dev queries are of packages that it was trained on"
    )


def train_adapter(
    system: str,
    model: QPeftModel,
    examples: list[dict],
    dev_examples: list[dict],
    output: Path,
    settings: Settings,
    seed: int,
) -> str:
    """Train an adapter in place, and keep the best of its evaluations on dev. Returns: a line on how it went.

    Args:
        system: its name.
        model: the model with the adapter.
        examples: all training examples, of which the system takes the first.
        dev_examples: examples that it is evaluated on.
        output: folder for checkpoints.
        settings: learning rate and sizes.
        seed: of the training.
    """
    from ..training.fit import fit

    count, learning_rate = settings.training_of(system)
    examples = examples[:count]
    steps = max(1, len(examples) // settings.queries_per_step)
    every = max(1, steps // settings.evaluations)
    done = fit(
        model,
        examples,
        output / "training" / system,
        learning_rate=learning_rate,
        batch_size=settings.queries_per_step,
        max_steps=steps,
        warm_up=steps // 10,
        dev=dev_examples,
        evaluate_first=True,
        save_every=every,
        log_every=every,
        seed=seed,
        bar=(system, "eval_mrr"),
        per_device_eval_batch_size=settings.queries_per_step,
        save_total_limit=1,
        metric_for_best_model="mrr",
        greater_is_better=True,
    )
    after = done.trainer.evaluate()
    trainable, total = model.get_nb_trainable_parameters()
    model.eval()
    return (
        f"{system}: {counted(steps, 'steps')} of {settings.queries_per_step} queries in {done.seconds:.0f} s; "
        f"reciprocal rank among {settings.num_negatives + 1} documents on dev {done.before['eval_mrr']:.3f} → "
        f"{after['eval_mrr']:.3f}; "
        f"{trainable:,} trainable parameters ({trainable / total:.1%})"
    )
