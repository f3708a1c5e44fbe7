"""Pointwise yes/no reranking, the usual way to fine-tune an LM as a reranker: is the document relevant to the query?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..config import QPeftConfig
from ..engine.rows import Rows
from ..model import QPeftModel, Scores
from ..prompts.pairs import PairBatch, pad, to_device

ANSWERS = "yes", "no"


class YesNoModel(QPeftModel):
    """A model whose score of a pair is logit(yes) − logit(no) after ``Passage: … Question: {query}\\nRelevant:``.

    The document comes first here too, so that its prefix is shared and cached. The score takes the place of the query's
    log-likelihood, with one token, so that losses read it as it is; "listwise" with temperature 1 is the softmax
    cross-entropy over an example's documents.

    An adapter that it saves does not say that it answers yes or no: only this class can load it (`load_weights_into`).

    Args:
        lm, config, tokenizer: as for `QPeftModel`, with ``clues="none"``.

    Raises: ValueError if both answers begin with the same token, or for a template in which the query is an answer.
    """

    def __init__(self, lm, config: QPeftConfig, tokenizer) -> None:
        super().__init__(lm, config, tokenizer)

        if self.prompt.query_is_answer:
            raise ValueError(
                f"yes/no asks behind the query, which template={config.template!r} has as the answer; give this method "
                "options: {template: qpeft}"
            )

        def ids(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        self.asked = tuple(ids("\nRelevant:"))
        self.answers = tuple(ids(self.prompt.spaced(answer))[0] for answer in ANSWERS)
        if len(set(self.answers)) == 1:
            raise ValueError(
                f"yes/no: the tokenizer begins {' and '.join(map(repr, ANSWERS))} with the same token; "
                "this method needs another LM"
            )

    def forward(self, batch: PairBatch, *args, **options) -> Scores:
        """Compute logit(yes) − logit(no) of B pairs; arguments are those of `QPeftModel.forward`."""
        scores = super().forward(batch, *args, **options).query_log_likelihood
        return Scores(scores, torch.ones_like(scores, dtype=torch.long))

    def _rows(self, batch: PairBatch, counts: Sequence[int], with_prefix: bool) -> Rows:
        rows, prefix_lengths = [], []
        for q, d in batch.pairs:
            prefix = batch.documents[d].ids
            prefix_lengths.append(len(prefix))
            before, _, _ = self.prompt.suffix.lay_out(prefix if with_prefix else (), clues=0)
            rows.append((*before, *batch.queries[q], *self.asked))
        lengths = np.array([len(row) for row in rows])
        starts = np.zeros_like(lengths) if with_prefix else np.array(prefix_lengths)
        ids, mask = pad(rows, self.device)
        last = np.arange(len(rows)) * ids.shape[1] + lengths - 1

        def tensor(array) -> Tensor:
            return to_device(np.asarray(array, dtype=np.int64), self.device)

        return _AnswerRows(
            ids, mask.long(), positions=tensor(starts[:, None] + np.arange(ids.shape[1])), clue_slots=tensor([]),
            before_query=tensor(last.repeat(2)), target_ids=tensor(self.answers * len(rows)),
            target_slots=tensor(np.arange(2 * len(rows))), longest_query=2, end=int((starts + lengths).max()),
        )  # fmt: skip


@dataclass
class _AnswerRows(Rows):
    """Rows with two targets each: yes and no, after the same token."""

    @property
    def read(self) -> Tensor:
        return self.before_query[::2]

    def sum_of_each_pair(self, of_targets: Tensor) -> Tensor:
        """Compute log p(yes) − log p(no) of each pair, which is the difference of their logits; [N] -> [B]."""
        yes, no = of_targets.view(-1, 2).T
        return yes - no
