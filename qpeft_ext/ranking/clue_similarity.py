"""Scores of the clues without an LM, the sum of their similarities: a baseline for every method."""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapters.filters import ClueFilter, allowed_ids
from ..adapters.inputs import ClueInputs
from ..adapters.top_k_clues import TopKClues
from ..model import QPeftModel
from ..ops import similarity_topk
from ..prompts.pairs import PairBatch


class ClueSimilarity:
    """Sums of clue scores for the pairs of a batch.

    With `TopKClues` these are the clues that it chooses, with its own source, filters, metric, and trained projection.
    Other models ("attention", "none") are given the k tokens of the document that are most similar to a query token by
    `similarity_topk`, with the filters and the metric of their config.
    """

    def __init__(self, model: QPeftModel) -> None:
        self.model, config = model, model.qpeft_config
        self.filter: ClueFilter | None = None
        self.clues = model.clues if isinstance(model.clues, TopKClues) else None
        if self.clues is None:
            allowed = allowed_ids(model.tokenizer, len(model.engine.table), config.filters)
            self.filter = ClueFilter(allowed, "query_tokens" in config.filters).to(model.device)

    @torch.no_grad()
    def __call__(self, batch: PairBatch) -> Tensor:
        """Return the sum of each pair, [B]; 0 for a pair without clues."""
        model, config, table = self.model, self.model.qpeft_config, self.model.engine.table
        inputs = ClueInputs.from_batch(batch, model.device, config.source)
        if self.clues is not None:
            chosen = self.clues.select(inputs, table)
        else:
            assert self.filter is not None
            documents = table, inputs.document_ids, self.filter.tokens(inputs, inputs.query_index), inputs.query_index
            query_embeds = table[inputs.query_ids]
            chosen = similarity_topk(query_embeds, inputs.query_mask, *documents, config.k, config.similarity)
        sums = chosen.scores.masked_fill(chosen.clue_ids < 0, 0).sum(1)
        return sums if config.source == "document" else sums[inputs.query_index]
