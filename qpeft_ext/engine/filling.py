"""Putting the prefixes of a batch into a cache before its pairs are scored."""

from __future__ import annotations

from typing import Any

import torch

from ..prefixes.cache import DocumentCache
from ..prompts.pairs import PairBatch
from .base import BaseEngine
from .causal import CausalEngine
from .groups import prefix_groups
from .schedule import prefix_tokens, tokens_worth_a_pass


class CacheFilling:
    """Fills a cache with the prefixes of whole batches.

    When all prefixes of a batch are in the memory of a cache, its pairs may be scored in passes across documents of any
    length (``prefilled`` of `QPeftModel.forward`).

    Args:
        engine: computes the prefixes; an engine that cannot share them fills nothing.
        cache: what is filled.
        deterministic: whether prefixes are computed unpadded, one per pass.
    """

    def __init__(self, engine: BaseEngine[Any, Any], cache: DocumentCache, deterministic: bool) -> None:
        self.engine = engine if isinstance(engine, CausalEngine) and not engine.why_not_cached else None
        self.cache, self.deterministic = cache, deterministic

    def announce(self, batch: PairBatch) -> bool:
        """Have the prefixes of a batch read ahead from files, without waiting.

        Returns: whether there are any to read.
        """
        if self.engine is None:
            return False
        prefixes = [batch.documents[d].ids for d in {d for _, d in batch.pairs}]
        return self.cache.announce(self.engine.cache_keys(prefixes, self.cache, self.deterministic))

    def has_room(self, batch: PairBatch) -> bool:
        """Tell whether the memory of the cache has room for all prefixes of a batch at once."""
        return self.engine is not None and self.engine.prefix_bytes(batch.documents, self.cache) <= self.cache.max_bytes

    @torch.no_grad()
    def fill(self, batch: PairBatch, max_tokens: int) -> bool:
        """Put all prefixes of a batch into the cache, if it has room for them.

        To be called inside `QPeftModel.passes`, as every pass.

        Args:
            max_tokens: token budget of a pass.
        Returns: whether they are in the cache.
        """
        if self.engine is None or not self.has_room(batch):
            return False
        device, dtype = self.engine.device, self.engine.table.dtype
        budget = prefix_tokens(max_tokens, device, prefilled=False)
        for documents in prefix_groups(batch, budget, tokens_worth_a_pass(device, dtype)):
            prefixes = [batch.documents[d].ids for d in documents]
            self.engine.cached_prefill(prefixes, self.cache, deterministic=self.deterministic)
        return True
