"""Prefixes of documents that methods can read from an index, since they have the LM and the prompt of the plan."""

from __future__ import annotations

from ..model import QPeftModel
from ..prefixes.cache import DocumentCache
from ..prefixes.index import PrefixIndex
from ..prefixes.manifest import prompt_settings
from ..prompts.prompt import Prompt
from .plan import Method


def reads_index(method: Method, model: QPeftModel, prompt: Prompt) -> bool:
    """Return whether the prefixes of a method are those in the index of the plan's LM and prompt.

    They are not where the LM has an adapter or is trained itself, and where the method has a template or a soft prompt
    of its own. A method whose documents are not read on their own has no prefixes.

    Args:
        method: the method.
        model: its model.
        prompt: the prompt of the plan.
    """
    if not method.preset.lm or method.preset.peft or model.qpeft_config.train_lm or model.engine.why_not_cached:
        return False
    return prompt_settings(model.prompt) == prompt_settings(prompt)


class Prefixes:
    """The cache that a method is trained with, or ranks with.

    Args:
        cache_bytes: memory for prefixes.
        index: an index with prefixes of the method, or None.

    Attributes:
        cache: the cache; None if there is neither memory nor an index.
    """

    def __init__(self, cache_bytes: int, index: PrefixIndex | None) -> None:
        self.cache = DocumentCache(cache_bytes, index=index) if cache_bytes or index is not None else None
        self._index, self._before = index, 0 if index is None else index.hits

    @property
    def from_index(self) -> int:
        """How many prefixes the index gave since this was made."""
        return 0 if self._index is None else self._index.hits - self._before
