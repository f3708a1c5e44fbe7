"""The options that ranked best in our experiments, for `QPeftConfig.recommended`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .values import DISTILLATION, WRITTEN_TEMPLATES

_ENOUGH_NEGATIVES = 7  # with so many of its own, a query gains nothing from the documents of others


def recommended_options(examples: Sequence[Mapping[str, Any]] | None, options: dict[str, Any]) -> dict[str, Any]:
    """Return the recommended options, with those that are given.

    Args:
        examples: training examples, or None.
        options: what a user chose, which wins.
    """
    clues = "top_k" if options.get("template", "qpeft") in WRITTEN_TEMPLATES else "none"
    options = {"clues": clues, "loss": "listwise", "num_hard_negatives": _ENOUGH_NEGATIVES} | options
    learns_nothing = options["clues"] == "none" or options["loss"] == "pointwise" or options.get("compat") == "official"
    options = {"generated_lora_rank": None if learns_nothing else 16} | options
    if options["generated_lora_rank"] is not None:
        options = {"target_modules": ("all-linear",)} | options
    if options["loss"] in DISTILLATION:  # a teacher has scored the query's own documents only
        options = {"in_batch_negatives": False} | options
    if examples is not None and options["loss"] != "contrastive":  # which is made of the group's other documents
        fewest = min((len(example.get("negatives", ())) for example in examples), default=0)
        if min(options["num_hard_negatives"], fewest) >= _ENOUGH_NEGATIVES:
            options = {"in_batch_negatives": False} | options
    return options
