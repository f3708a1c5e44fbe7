"""The prefixes that methods of a comparison have in common: those of the plan's LM and prompt, from an index."""

from __future__ import annotations

from ..prefixes.cache import DocumentCache
from ..prefixes.index import PrefixIndex, prompt_settings
from ..prompts.prompt import Prompt
from .plan import Method


def reads_index(method: Method, model, prompt: Prompt) -> bool:
    """Whether the prefixes of a method are those of the plan's LM. ``prompt``: the plan's.

    An adapter in the LM, a trained LM, another layout, another template or a soft prompt makes its own.
    """
    own = method.preset.peft or model.qpeft_config.train_lm or model.engine.why_plain
    return method.preset.lm and not own and prompt_settings(model.prompt) == prompt_settings(prompt)


class Prefixes:
    """The cache that a method is trained with, or ranks with.

    Attributes: cache: a `DocumentCache`, or None.  from_index: prefixes that the index gave since this was made.
    """

    def __init__(self, cache_bytes: int, index: PrefixIndex | None) -> None:
        self.cache = DocumentCache(cache_bytes, index=index) if cache_bytes or index is not None else None
        self._index, self._before = index, 0 if index is None else index.hits

    @property
    def from_index(self) -> int:
        return 0 if self._index is None else self._index.hits - self._before
