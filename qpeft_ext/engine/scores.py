"""The scores of pairs, put together from those of passes, and the clues that passes read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..adapters.layers import Clues
from ..prompts.pairs import PairBatch
from ..utils.torch_state import refuse_backward_in_autocast

SumOfEachPair = Callable[[Tensor], Tensor]  # numbers of all scored tokens, [N], to their sums over each pair, [B]
CountTokens = Callable[[Tensor, SumOfEachPair, PairBatch], Tensor]  # log p [N] to the number of tokens of each pair


@dataclass
class Scores:
    """Scores of B pairs; larger is better.

    likelihood: Σ log p(query token), nats, float32 [B]; None where the query is not scored.
    num_tokens: the number of tokens in the sum, int64 [B]: those of the query (and its ``</s>`` where the template
        scores it). With ``compat="official"`` BOS and EOS count as query tokens, and tokens with a log p of 0 do not.
    answer: what is read behind the query: log-odds in nats, or an expected grade, float32 [B]; None where nothing is.
    mixed: the score of "both" (`MixedScore`), float32 [B]; None for others.
    """

    likelihood: Tensor | None = None
    num_tokens: Tensor | None = None
    answer: Tensor | None = None
    mixed: Tensor | None = None

    @property
    def query_log_likelihood(self) -> Tensor:
        """Σ log p(query token), [B]. Raises: ValueError where the query is not scored."""
        if self.likelihood is None:
            raise ValueError("this model's score is an answer behind the query, so there is no likelihood of the query")
        return self.likelihood

    @property
    def mean_query_log_likelihood(self) -> Tensor:
        """The sum ÷ the number of its tokens, [B]; it ranks documents as the sum does, and queries can be compared.

        Raises: as `query_log_likelihood`.
        """
        total = self.query_log_likelihood
        assert self.num_tokens is not None, "it comes with the sum"
        return total / self.num_tokens

    @property
    def compared(self) -> Tensor:
        """The numbers that losses compare, [B]: the mean log-likelihood, the answer, or their sum."""
        if self.mixed is not None:
            return self.mixed
        return self.mean_query_log_likelihood if self.answer is None else self.answer


def in_order(groups: Sequence[Sequence[int]], parts: Sequence[Scores]) -> Scores:
    """Put the scores of passes into the order of the pairs.

    Args:
        groups: for each pass the pairs that it read; each pair is in one of them.
        parts: the scores of each pass.
    """
    rows = torch.tensor([row for group in groups for row in group])
    order = torch.empty_like(rows)
    order[rows] = torch.arange(len(rows))

    def joined(name: str) -> Tensor | None:
        of_parts = [getattr(part, name) for part in parts]
        if of_parts[0] is None:
            return None
        whole = torch.cat(of_parts)[order.to(of_parts[0].device)]
        return refuse_backward_in_autocast(whole) if whole.is_floating_point() else whole

    return Scores(*(joined(field.name) for field in fields(Scores)))


def count_all_tokens(log_p: Tensor, sum_of_each_pair: SumOfEachPair, batch: PairBatch) -> Tensor:
    """Count the scored tokens of each pair, int64 [B]."""
    return sum_of_each_pair(torch.ones_like(log_p, dtype=torch.long))


class PassClues:
    """The clues of the pairs of a batch, computed for as many pairs together as the schedule says.

    Args:
        compute: gives the clues of all pairs of a batch; None where the model has no clue module.
        batch: the whole batch.
    """

    def __init__(self, compute: Callable[[PairBatch], Clues | None], batch: PairBatch) -> None:
        self._compute, self._batch = compute, batch
        self._together: list[int] | None = None
        self._clues: Clues | None = None
        self._counts: list[int] = []
        self._place: dict[int, int] = {}

    def of(self, pairs: list[int], together: list[int] | None) -> tuple[Clues | None, list[int]]:
        """Give the clues of the pairs of a pass, and how many each of them has.

        Args:
            pairs: indices into ``batch.pairs``.
            together: `Pass.clues_of`.
        """
        if together is None:
            return self._computed(pairs)
        if together is not self._together:
            self._together = together
            self._clues, self._counts = self._computed(together)
            self._place = {pair: place for place, pair in enumerate(together)}
        places = [self._place[pair] for pair in pairs]
        return self._clues and self._clues[places], [self._counts[place] for place in places]

    def _computed(self, pairs: list[int]) -> tuple[Clues | None, list[int]]:
        clues = self._compute(self._batch.select(pairs))
        return clues, counts_of(clues, len(pairs))


def counts_of(clues: Clues | None, pairs: int) -> list[int]:
    """Count the clues of each pair. On a GPU this waits for all work so far, so count once for many passes."""
    return [0] * pairs if clues is None else clues.mask.sum(1).tolist()
