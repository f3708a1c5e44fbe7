"""The baseline `cached_torch`: documents that are read once, as a good user of plain transformers writes it.

Prefixes are read in left-padded batches, without the head, and kept in a dict. The suffixes of a batch of pairs are
read in one forward with a `DynamicCache` of their prefixes, and the head computes logits of query positions only.
Batches are sorted by length. Token ids, the order of the tokens in a suffix (`assemble_rows`) and the clues are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

import qpeft_ext as qpeft
from qpeft_ext.engine.rows import assemble_rows
from qpeft_ext.prompts.pairs import PairBatch

PREFIX_TOKENS, SUFFIX_TOKENS = 2048, 1024  # of a forward, padding included
Item = TypeVar("Item")


class CachedTorch:
    """Scores pairs with prefixes that it has read before.

    Args:
        model: of which the LM, the prompt and the clue module are used.
    """

    def __init__(self, model: qpeft.QPeftModel) -> None:
        self.model, self.lm = model, model.lm
        self.prefixes: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}  # keys and values of each layer

    @torch.no_grad()
    def score(self, texts: Sequence[tuple[str, object]]) -> np.ndarray:
        """Return the log-likelihood of each query, [B]; prefixes that are not there yet are read first."""
        batch = self.model.encode(texts)
        self.read([document.ids for document in batch.documents])
        scores = np.zeros(len(batch), dtype=np.float32)

        def length(i: int) -> int:
            q, d = batch.pairs[i]
            return 1000 * len(batch.queries[q]) + len(batch.documents[d].ids)  # short queries first

        longest = self.model.prompt.suffix.least_tokens + 2 * max(map(len, batch.queries))
        for group in _batches(range(len(batch)), length, lambda i: longest, SUFFIX_TOKENS):
            scores[group] = self.likelihood(batch.select(group)).cpu().numpy()
        return scores

    @torch.no_grad()
    def read(self, prefixes: Sequence[tuple[int, ...]]) -> None:
        """Compute the keys and values of those that are not in the dict, and put them there."""
        device = self.model.device
        missing = [prefix for prefix in dict.fromkeys(prefixes) if prefix not in self.prefixes]
        for group in _batches(missing, len, len, PREFIX_TOKENS):
            longest = max(map(len, group))
            ids, mask = (torch.zeros(len(group), longest, dtype=torch.long) for _ in range(2))
            for row, prefix in enumerate(group):
                ids[row, longest - len(prefix) :] = torch.tensor(prefix)
                mask[row, longest - len(prefix) :] = 1
            cache = DynamicCache(config=self.lm.config)
            self._decode(cache, (mask.cumsum(1) - 1).clamp_min(0), input_ids=ids.to(device), attention_mask=mask)
            for row, prefix in enumerate(group):
                start = longest - len(prefix)
                self.prefixes[prefix] = [
                    (layer.keys[row, :, start:].clone(), layer.values[row, :, start:].clone()) for layer in cache.layers
                ]

    def likelihood(self, batch: PairBatch) -> Tensor:
        """Return the log-likelihoods of queries by one forward of all suffixes, [B]; with gradient to the clues."""
        model = self.model
        clues = model.compute_clues(batch)
        counts = [0] * len(batch) if clues is None else clues.mask.sum(1).tolist()
        rows = assemble_rows(batch, model.prompt.suffix, counts, model.device, with_prefix=False)
        embeds = self.lm.get_input_embeddings()(rows.ids)
        if clues is not None:
            vectors = clues.embeds[clues.mask].to(embeds.dtype)
            embeds = embeds.flatten(0, 1).index_copy(0, rows.clue_slots, vectors).view_as(embeds)
        own = [self.prefixes[batch.documents[d].ids] for _, d in batch.pairs]
        lengths = torch.tensor([prefix[0][0].shape[1] for prefix in own])
        longest, cache = int(lengths.max()), DynamicCache(config=self.lm.config)
        for layer, of_all in enumerate(zip(*own, strict=True)):
            keys, values = (_left_padded([kv[which] for kv in of_all], longest) for which in (0, 1))
            cache.update(keys, values, layer)
        before = (torch.arange(longest) >= longest - lengths[:, None]).long().to(model.device)
        mask = torch.cat([before, rows.mask], dim=1)
        hidden = self._decode(cache, rows.positions, inputs_embeds=embeds, attention_mask=mask).flatten(0, 1)
        logits = self.lm.get_output_embeddings()(hidden[rows.read.slots]).float()
        log_p = -torch.nn.functional.cross_entropy(logits, rows.target_ids, reduction="none")
        return rows.sum_of_each_pair(log_p)

    def _decode(self, cache: DynamicCache, positions: Tensor, **arguments: Tensor) -> Tensor:
        arguments |= {"position_ids": positions.to(self.model.device), self.model.engine.cache_argument: cache}
        return self.lm.get_decoder()(**arguments, use_cache=True).last_hidden_state


def _batches(
    items: Sequence[Item], order: Callable[[Item], int], tokens: Callable[[Item], int], most: int
) -> Iterator[list[Item]]:
    """Yield the items in order, as many at a time as fit ``most`` tokens when padded to the longest."""
    batch: list[Item] = []
    for item in sorted(items, key=order):
        if batch and (len(batch) + 1) * tokens(item) > most:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _left_padded(rows: Sequence[Tensor], longest: int) -> Tensor:
    """Stack tensors [heads, P, width] of different P with zeros before them."""
    return torch.stack([torch.nn.functional.pad(row, (0, 0, longest - row.shape[1], 0)) for row in rows])
