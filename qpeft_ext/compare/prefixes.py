"""Prefixes of documents that methods can share, since they have the LM and the prompt of the plan."""

from __future__ import annotations

from pathlib import Path

from ..model import QPeftModel
from ..prefixes.cache import DocumentCache
from ..prefixes.index import PrefixIndex
from ..prefixes.manifest import prompt_settings
from ..prompts.prompt import Prompt
from ..utils.console import say
from .plan import PREFIXES, Method, Plan


def shares_prefixes(method: Method, model: QPeftModel, prompt: Prompt) -> bool:
    """Return whether the prefixes of a method are those of the plan's LM and prompt.

    They are not where the LM has an adapter or is trained itself, and where the method has a template or a soft prompt
    of its own. A method whose documents are not read on their own has no prefixes.

    Args:
        method: the method.
        model: its model.
        prompt: the prompt of the plan.
    """
    if not method.preset.lm or method.preset.peft or model.qpeft_config.train_lm or model.why_no_index:
        return False
    return prompt_settings(model.prompt) == prompt_settings(prompt)


def cache_on_disk(plan: Plan, output: Path) -> DocumentCache | None:
    """Open the cache whose files all methods and seeds share.

    Args:
        plan: the plan.
        output: folder of the results.
    Returns: None if the plan keeps no files, or if another process has them: one at a time can.
    """
    if not plan.disk_bytes:
        return None
    try:
        return DocumentCache(
            plan.cache_bytes, disk=output / PREFIXES, disk_bytes=plan.disk_bytes, kv_dtype=plan.kv_dtype
        )
    except ValueError as error:
        say(f"prefixes are not shared with other methods: {error}")
        return None


class Prefixes:
    """The cache that a method is trained with, or ranks with.

    Args:
        plan: has the budget of a cache in memory.
        index: an index with prefixes of the method, or None.
        shared: a cache with prefixes of the method that other methods filled, used where there is no index; or None.

    Attributes:
        cache: the cache; None if there is neither memory nor an index nor a shared cache.
    """

    def __init__(self, plan: Plan, index: PrefixIndex | None, shared: DocumentCache | None) -> None:
        self.cache: DocumentCache | None
        if index is not None:
            self.cache = DocumentCache(plan.cache_bytes, index=index, kv_dtype=plan.kv_dtype)
        elif shared is not None:
            self.cache = shared
        else:
            self.cache = DocumentCache(plan.cache_bytes, kv_dtype=plan.kv_dtype) if plan.cache_bytes else None
        self._before = self._from_files()

    def _from_files(self) -> int:
        if self.cache is None:
            return 0
        return sum(tier.hits for name, tier in self.cache.tiers.items() if name in ("disk", "index"))

    @property
    def from_index(self) -> int:
        """How many prefixes the index, or the files of other methods, gave since this was made."""
        return self._from_files() - self._before
