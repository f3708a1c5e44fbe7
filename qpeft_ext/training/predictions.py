"""What `Trainer`'s ``compute_metrics`` and ``predict`` get: the scores of every query's documents, and the labels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

PADDING = -100  # of labels, as everywhere in transformers


class Predictions:
    """Collects the tables of an evaluation over batches and ranks.

    Args:
        accelerator: of the trainer.
        batch_size: rows that every rank gathers a batch, Q at most.
        preprocess: ``preprocess_logits_for_metrics``: (scores [Q, C], labels [Q, C]) → a tensor [Q] or [Q, …].
    """

    def __init__(self, accelerator, batch_size: int, preprocess: Callable[[Tensor, Tensor], Tensor] | None) -> None:
        self.accelerator, self.batch_size, self.preprocess = accelerator, batch_size, preprocess
        self._batches: list[tuple[Tensor, Tensor]] = []

    def add(self, table: Tensor, positive: Tensor, mask: Tensor, kept: Tensor, queries: int) -> None:
        """One batch.

        Args:
            table: scores, [Q, M] float32.  positive, mask: [Q, M] bool.
            kept: which of the gathered rows are real, [ranks × batch_size] bool.  queries: how many of Q count.
        """
        scores = table.masked_fill(~mask, -torch.inf)
        labels = positive.long().masked_fill(~mask, PADDING)
        if self.preprocess is not None:
            scores = self.preprocess(scores, labels)
            if not isinstance(scores, Tensor) or not scores.ndim or len(scores) != len(labels):
                got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                raise TypeError(
                    f"preprocess_logits_for_metrics must return a tensor with a row for each of the "
                    f"{len(labels)} queries, got {got}"
                )
        rows = (self._gathered(part[:queries])[kept].cpu() for part in (scores, labels))
        self._batches.append(tuple(rows))

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """(predictions, label_ids) of all queries, in the order of the examples."""
        return tuple(
            torch.cat([_widened(part, width) for part in parts]).numpy()
            for parts in zip(*self._batches, strict=True)
            for width in [max(part.shape[1] if part.ndim > 1 else 0 for part in parts)]
        )

    def _gathered(self, rows: Tensor) -> Tensor:
        rows = pad(rows, (0, 0) * (rows.ndim - 1) + (0, self.batch_size - len(rows)))
        if rows.ndim > 1:
            rows = self.accelerator.pad_across_processes(rows, dim=1, pad_index=_padding(rows))
        return self.accelerator.gather(rows)


def _padding(rows: Tensor) -> float:
    return -torch.inf if rows.is_floating_point() else PADDING


def _widened(rows: Tensor, width: int) -> Tensor:
    return (
        pad(rows, (0, 0) * (rows.ndim - 2) + (0, width - rows.shape[1]), value=_padding(rows))
        if rows.ndim > 1
        else rows
    )
