"""Scores and labels of every query's documents, for ``compute_metrics`` and ``predict`` of `Trainer`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

PADDING = -100  # of labels, as everywhere in transformers


class Predictions:
    """Collects the tables of an evaluation over batches and ranks.

    Args:
        accelerator: the trainer's; it gathers the rows of all ranks.
        batch_size: queries of a batch on one rank, at most.
        preprocess: ``preprocess_logits_for_metrics``: (scores [Q, C], labels [Q, C]) → a tensor [Q] or [Q, …].
    """

    def __init__(
        self, accelerator: Any, batch_size: int, preprocess: Callable[[Tensor, Tensor], Tensor] | None
    ) -> None:
        self.accelerator, self.batch_size, self.preprocess = accelerator, batch_size, preprocess
        self._batches: list[tuple[Tensor, Tensor]] = []

    def add(self, table: Tensor, positive: Tensor, mask: Tensor, kept: Tensor, queries: int) -> None:
        """Take in one batch.

        Args:
            table: scores, [Q, M] float32.
            positive, mask: [Q, M] bool.
            kept: which of the gathered rows are real, [ranks × batch_size] bool.
            queries: how many of the Q queries count.
        Raises: TypeError if ``preprocess`` returns something else than a tensor of Q rows.
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
        own_scores, own_labels = (self._gathered(part[:queries])[kept].cpu() for part in (scores, labels))
        self._batches.append((own_scores, own_labels))

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (predictions, label_ids) of all queries, in the order of the examples."""
        scores, labels = zip(*self._batches, strict=True)
        return _joined(scores), _joined(labels)

    def _gathered(self, rows: Tensor) -> Tensor:
        rows = pad(rows, (0, 0) * (rows.ndim - 1) + (0, self.batch_size - len(rows)))
        if rows.ndim > 1:
            rows = self.accelerator.pad_across_processes(rows, dim=1, pad_index=_padding(rows))
        return self.accelerator.gather(rows)


def _joined(parts: Sequence[Tensor]) -> np.ndarray:
    """The rows of all parts, padded to the widest."""
    width = max(part.shape[1] if part.ndim > 1 else 0 for part in parts)
    return torch.cat([_widened(part, width) for part in parts]).numpy()


def _padding(rows: Tensor) -> float:
    return -torch.inf if rows.is_floating_point() else PADDING


def _widened(rows: Tensor, width: int) -> Tensor:
    if rows.ndim == 1:
        return rows
    return pad(rows, (0, 0) * (rows.ndim - 2) + (0, width - rows.shape[1]), value=_padding(rows))
