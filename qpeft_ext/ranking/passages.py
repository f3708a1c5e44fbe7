"""Documents scored by their passages: the best one's score (MaxP), the mean, or that of the first one (FirstP).

Source: Dai and Callan 2019, https://arxiv.org/abs/1905.09217.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..prompts.passages import Passage, Splitter, check_passages, own_text
from ..prompts.prompt import Document, Prompt


class PassageScoring:
    """How documents are split, and how the scores of their passages make one score.

    Args:
        prompt: the model's.
        combine: "max", "mean" or "first".
        tokens, stride: as for `Splitter`.
    Attributes:
        splitter: where documents are split.
        long_sentences: sentences longer than a passage, which were split between words, so far.
        cut_titles: titles longer than half a passage, which were cut to that, so far.
    Raises: ValueError for another word, or as `Splitter`.
    """

    def __init__(self, prompt: Prompt, combine: str, tokens: int | None = None, stride: int | None = None) -> None:
        check_passages(combine, tokens, stride)
        self.combine = combine
        self.splitter = Splitter(prompt, tokens, stride)
        self.long_sentences = self.cut_titles = 0

    @classmethod
    def of(
        cls, prompt: Prompt, combine: str | None, tokens: int | None = None, stride: int | None = None
    ) -> PassageScoring | None:
        """Return what the options of `Reranker` ask for; None without ``passages``."""
        check_passages(combine, tokens, stride)
        return None if combine is None else cls(prompt, combine, tokens, stride)

    def __repr__(self) -> str:
        return f"passages: {self.combine} of {self.splitter.tokens} tokens, every {self.splitter.stride}"

    def split(self, documents: Sequence[Document]) -> list[list[Passage]]:
        """Split documents, each distinct one once.

        Args:
            documents: strings or dicts.
        Returns: the passages of each; with "first" only the first one.
        """
        places: dict[tuple[str, str], int] = {}
        distinct: list[Document] = []
        order = []
        for document in documents:
            title = "" if isinstance(document, str) else document.get("title") or ""
            place = places.setdefault((title, own_text(document)), len(distinct))
            if place == len(distinct):
                distinct.append(document)
            order.append(place)
        splits = self.splitter.splits(distinct)
        self.long_sentences += sum(split.long_sentences for split in splits)
        self.cut_titles += sum(split.cut for split in splits)
        wanted = 1 if self.combine == "first" else None
        found = [self.splitter.passages(*each)[:wanted] for each in zip(distinct, splits, strict=True)]
        return [found[place] for place in order]

    def combined(self, scores: np.ndarray, counts: Sequence[int]) -> tuple[np.ndarray, list[int]]:
        """Make scores of documents from scores of passages.

        Args:
            scores: of all passages, one document after the other, float32 [N].
            counts: the number of passages of each document; they add up to N, and none is 0.
        Returns: float32 [len(counts)]; which passage of each document is the best, the earlier of equal ones.
        """
        if not counts:
            return np.zeros(0, dtype=np.float32), []
        parts = np.split(scores.astype(np.float64), np.cumsum(counts)[:-1])
        one = np.mean if self.combine == "mean" else np.max
        return np.array([one(part) for part in parts], dtype=np.float32), [int(part.argmax()) for part in parts]
