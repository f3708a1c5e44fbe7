"""Spans: the parts of a document that made it relevant, from its clues and from what the LM says of its sentences."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..prompts.pieces import DocumentPrefix
from ..prompts.prompt import Document
from .explain import Explanation

NATS = 2.0  # of evidence by which a sentence is e times as likely as another one to be the relevant one
_ABOVE_UNIFORM = 2.0  # attention to a token, as a multiple of what each would get, above which it is part of a span
_LETTER = re.compile(r"\w")

Place = tuple[int, int]  # (start, end) of characters, end exclusive


@dataclass(frozen=True)
class Span:
    """A part of a document.

    Attributes:
        start, end: its characters in the document as it was given, in a dict those of its "text"; ``end`` exclusive.
        score: its share of all that made the document relevant, in [0, 1].
        text: its characters.
    """

    start: int
    end: int
    score: float
    text: str


def own_text(document: Document) -> str:
    """Return the text that spans are places in."""
    return document if isinstance(document, str) else str(document["text"])


def visible_slots(
    prefix: DocumentPrefix, offsets: Sequence[Place], sentences: Sequence[Place], text_start: int
) -> tuple[torch.Tensor, list[int]]:
    """Lay out which tokens of a prefix are seen with one sentence alone, and without it.

    The title and the words of the prompt are always seen.

    Args:
        prefix: of the document.
        offsets: characters of its document tokens, as `Prompt.offsets` gives them.
        sentences: characters of the sentences in the document's own text.
        text_start: where this text begins in the text that offsets are places in.
    Returns: bool [2·S, P], first each sentence alone, then all but each; and the places of these S sentences, which
        have a token in the prefix, in ``sentences``.
    """
    inside = np.zeros((len(sentences), len(prefix.ids)), dtype=bool)
    for s, (first, last) in enumerate(sentences):
        for slot, (start, end) in enumerate(offsets, start=prefix.start):
            inside[s, slot] = start < last + text_start and end > first + text_start
    kept = np.flatnonzero(inside.any(1))
    inside = inside[kept]
    others = inside.any(0) & ~inside  # a token of two sentences is seen with each of them
    return torch.from_numpy(np.concatenate([~others, ~inside])), kept.tolist()


def shares(evidence: Sequence[float] | np.ndarray) -> np.ndarray:
    """Turn evidence in nats into shares that add up to 1: a softmax with the temperature `NATS`."""
    scaled = (np.asarray(evidence, dtype=np.float64) - np.max(evidence)) / NATS
    return np.exp(scaled) / np.exp(scaled).sum()


def clue_phrases(explanation: Explanation, text: str) -> list[tuple[Place, float]]:
    """Merge clue tokens into words, and words that follow each other into phrases.

    Args:
        explanation: of the pair.
        text: the document's own text.
    Returns: the places in ``text`` in order, and the share of each in the weights of all.
    """
    found = [(explanation.place_in_document(clue), clue.weight) for clue in explanation.clues]
    tokens = [(place, weight) for place, weight in found if place is not None and weight > 0]
    if explanation.attention is not None:
        least = _ABOVE_UNIFORM / max(1, len(explanation.attention.spans))
        tokens = [(place, weight) for place, weight in tokens if weight >= least]
    phrases: list[tuple[Place, float]] = []
    for place, weight in sorted((_whole_word(text, place), weight) for place, weight in tokens):
        if place[0] == place[1]:  # only spaces
            continue
        (start, end), before = phrases[-1] if phrases else ((0, -1), 0.0)
        if phrases and (place[0] <= end or not text[end : place[0]].strip()):
            phrases[-1] = (start, max(end, place[1])), before + weight
        elif _LETTER.search(text, *place):
            phrases.append((place, weight))
    total = sum(weight for _, weight in phrases)
    return [(place, weight / total) for place, weight in phrases]


def _whole_word(text: str, place: Place) -> Place:
    """Widen a place to the borders of words, and take spaces at its ends away."""
    start, end = place
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    while 0 < start < len(text) and _LETTER.match(text[start]) and _LETTER.match(text[start - 1]):
        start -= 1
    while 0 < end < len(text) and _LETTER.match(text[end - 1]) and _LETTER.match(text[end]):
        end += 1
    return start, end


def weighed(
    phrases: Sequence[tuple[Place, float]], sentences: Sequence[tuple[Place, float]]
) -> list[tuple[Place, float]]:
    """Weigh phrases by the shares of the sentences that they begin in; the result adds up to 1.

    Args:
        phrases, sentences: places and shares.
    """
    found = [(place, share * sum(s for (a, b), s in sentences if a <= place[0] < b)) for place, share in phrases]
    total = sum(share for _, share in found)
    return [(place, share / total) for place, share in found] if total else list(phrases)


def best_spans(text: str, found: Sequence[tuple[Place, float]], threshold: float, max_spans: int | None) -> list[Span]:
    """Return spans of at least ``threshold``, best first; equal scores in the order of the text."""
    spans = [Span(start, end, float(score), text[start:end]) for (start, end), score in found if score >= threshold]
    return sorted(spans, key=lambda span: (-span.score, span.start))[:max_spans]


def evidence_of_texts(
    score: Callable[[list[Document]], np.ndarray], document: Document, sentences: Sequence[Place]
) -> np.ndarray:
    """Compute the evidence for sentences from documents that have one of them, or lack it.

    For LMs whose prefixes cannot be shared.

    Args:
        score: gives Σ log p of the query behind each of some documents.
        document: the document.
        sentences: their characters in its own text.
    Returns: nats, [S].
    """
    text = own_text(document)
    parts = [text[a:b] for a, b in sentences] + [f"{text[:a]} {text[b:]}" for a, b in sentences]
    texts: list[Document] = [part if isinstance(document, str) else {**document, "text": part} for part in parts]
    found = score(texts)
    return found[: len(sentences)] - found[len(sentences) :]
