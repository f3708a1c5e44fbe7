"""Measures of an evaluation: loss, accuracy and reciprocal rank of each query, collected over batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.trainer_utils import EvalPrediction, denumpify_detensorize

from ..config import QPeftConfig
from .losses import configured_loss
from .predictions import Predictions

LOSS_TABLES = ("positive", "mask", "document", "teacher_scores")  # of `GroupCollator`, in the order of the loss
_MEASURES = ("loss", "accuracy", "mrr")


def query_measures(config: QPeftConfig, table: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Loss, accuracy and reciprocal rank of every query; NaN for the latter two without negatives.

    Ties count against the positive.

    Args:
        config: names the loss.
        table: ℓ of every query and document, [Q, M] float32.
        inputs: the batch, as `GroupCollator` makes it.
    Returns: float32 [Q, 3].
    """
    positive, mask = inputs["positive"], inputs["mask"]
    losses = [
        configured_loss(config, table[q : q + 1], *(inputs[name][q : q + 1] for name in LOSS_TABLES))
        for q in range(len(table))
    ]
    negative = mask & ~positive
    best = table.masked_fill(~positive, float("-inf")).amax(1, keepdim=True)
    rank = 1.0 + (negative & (table >= best)).sum(1)
    rank = torch.where(negative.any(1), rank, torch.nan)
    return torch.stack([torch.stack(losses), torch.where(rank.isnan(), rank, (rank == 1).float()), 1 / rank], dim=1)


def computed_metrics(function: Callable[[EvalPrediction], Any] | None, scores: EvalPrediction) -> dict[str, float]:
    """Call the user's ``compute_metrics`` on the scores.

    Raises: TypeError if that is no dict.
    """
    if function is None:
        return {}
    computed = function(scores)
    if not isinstance(computed, dict):
        raise TypeError(
            f"QPeftTrainer: compute_metrics must return a dict of name and number, got {type(computed).__name__}"
        )
    return denumpify_detensorize(computed)


class Evaluation:
    """Collects the measures, and the scores if they are wanted, of all queries of an evaluation.

    Args:
        accelerator: the trainer's; it gathers the rows of all ranks.
        batch_size: queries of a batch on one rank, at most.
        scores: whether scores and labels are collected too.
        preprocess: ``preprocess_logits_for_metrics``; see `Predictions`.
    """

    def __init__(
        self,
        accelerator: Any,
        batch_size: int,
        scores: bool,
        preprocess: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> None:
        self._accelerator, self._batch_size = accelerator, batch_size
        self._rows: list[Tensor] = []
        self.predictions = Predictions(accelerator, batch_size, preprocess) if scores else None

    def add(self, measures: Tensor, table: Tensor, inputs: Mapping[str, Any]) -> None:
        """Take in one batch.

        Args:
            measures: [Q, 3], as `query_measures` gives them.
            table: ℓ, [Q, M] float32.
            inputs: the batch; of its Q queries the first ``inputs["queries"]`` count.
        """
        measures = measures[: inputs["queries"]]
        # of the same size on all ranks; the last column says which rows are real
        padded = pad(measures, (0, 1, 0, self._batch_size - len(measures)))
        padded[: len(measures), -1] = 1
        gathered = self._accelerator.gather(padded)
        kept = gathered[:, -1] == 1
        self._rows.append(gathered[kept, :-1])
        if self.predictions is not None:
            self.predictions.add(table, inputs["positive"], inputs["mask"], kept, inputs["queries"])

    def means(self) -> tuple[dict[str, float], int]:
        """The mean of each measure over the queries that have it, and the number of queries; 0 without a batch."""
        if not self._rows:
            return {}, 0
        measures = torch.cat(self._rows).double().cpu()
        means = {
            name: float(column.nanmean())
            for name, column in zip(_MEASURES, measures.T, strict=True)
            if not column.isnan().all()
        }
        return means, len(measures)
