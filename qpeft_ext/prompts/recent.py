"""Documents that were tokenised last: a text that comes again, in the next request say, is not tokenised again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .pieces import DocumentPrefix


class RecentDocuments:
    """Prefixes by their texts, those least recently asked for first.

    Several threads may use it without a lock: each step is one of a dict, and a prefix that is lost is made again.

    Args:
        most: how many are kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._prefixes: dict[str, DocumentPrefix] = {}

    def prefixes(self, texts: Sequence[str], make: Callable[[list[str]], list[DocumentPrefix]]) -> list[DocumentPrefix]:
        """Give the prefixes of texts.

        Args:
            texts: of documents.
            make: makes the prefixes of texts that are not known.
        """
        found = {text: self._prefixes.pop(text, None) for text in dict.fromkeys(texts)}
        new = [text for text, prefix in found.items() if prefix is None]
        found |= zip(new, make(new) if new else (), strict=True)
        known = {text: prefix for text, prefix in found.items() if prefix is not None}
        for text, prefix in known.items():
            if not prefix.cut:  # a long document's text may be of any size
                self._prefixes[text] = prefix
        for text in list(self._prefixes)[: -self._most]:
            self._prefixes.pop(text, None)
        return [known[text] for text in texts]

    def clear(self) -> None:
        """Forget all."""
        self._prefixes.clear()
