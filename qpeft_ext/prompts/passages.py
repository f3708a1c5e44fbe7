"""Long documents as passages: parts of whole sentences that fit into the length limit, each with the title."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence, Set
from itertools import chain, pairwise, repeat
from typing import NamedTuple

from ..utils.inputs import whole_number
from .prompt import Document, Prompt, document_text
from .sentences import Span, sentence_spans, stripped, word_spans

PASSAGES = ("max", "mean", "first")  # how the scores of passages make one
LEAST_TOKENS = 16  # of a passage: room for a title and some words
_MARGIN = 2  # tokens that a sentence may have more behind a title than alone
_MOST_KEPT = 1 << 16  # splits of documents that are remembered; a few hundred bytes each


class Passage(NamedTuple):
    """A part of a document.

    Attributes:
        document: the part with the title, as the prompt takes it; the document itself if it is one passage.
        start, end: its characters in the document's own text (the string, or "text" of the dict), end exclusive.
    """

    document: Document
    start: int
    end: int


class Split(NamedTuple):
    """How a document is split.

    Attributes:
        title: what goes with each passage; None if the document is one passage, as it is.
        spans: (start, end) of each passage in the document's own text.
        long_sentences: sentences that were longer than a passage and were split between words.
        cut: whether the title was longer than half a passage and was cut to that.
    """

    title: str | None
    spans: tuple[Span, ...]
    long_sentences: int = 0
    cut: bool = False


class Splitter:
    """Splits documents into passages on the borders of sentences.

    A document that fits into a passage is one, as it is. Another one is split: a passage has as many whole sentences as
    fit beside the title, and the next one begins ``stride`` tokens later, at the latest where this one ends. A sentence
    that is longer than a passage is split between words, and a word that is longer (or a text without spaces) between
    characters.

    Passages depend on the document only, and those before a change in it stay as they are. Several threads may use one
    splitter.

    Args:
        prompt: the model's; it counts tokens.
        tokens: longest passage in tokens, title and text together; None: ``max_document_tokens``.
        stride: tokens from the beginning of a passage to that of the next; None: ``tokens``, so that none overlap.
    Attributes:
        tokens, stride: as given, with the defaults filled in.
    Raises: ValueError for tokens above ``max_document_tokens`` or below 16, or a stride above ``tokens`` or below 1.
    """

    def __init__(self, prompt: Prompt, tokens: int | None = None, stride: int | None = None) -> None:
        self.prompt = prompt
        self.tokens, self.stride = _checked_lengths(tokens, stride, prompt.max_document_tokens)
        self._overhead = self._lengths([""])[0]
        self._kept: dict[bytes, Split] = {}

    @property
    def settings(self) -> dict[str, int]:
        """Give tokens and stride: what decides, with the prompt, about the passages of a text."""
        return {"passage_tokens": self.tokens, "passage_stride": self.stride}

    def splits(self, documents: Sequence[Document]) -> list[Split]:
        """Decide where documents are split.

        Args:
            documents: strings or dicts, as for `document_text`.
        Returns: the `Split` of each; a document without text has one passage.
        """
        for place, document in enumerate(documents):
            document_text(document, f"document {place}")  # raises where it is none
        keys = [_key(document) for document in documents]
        kept = self._kept  # another thread may put a new dict in its place
        missing = {key: document for key, document in zip(keys, documents, strict=True) if key not in kept}
        found = {key: kept[key] for key in keys if key not in missing}
        if missing:
            lengths = self._lengths(list(missing.values()))
            for (key, document), length in zip(missing.items(), lengths, strict=True):
                fits = length <= self.tokens
                found[key] = Split(None, ((0, len(own_text(document))),)) if fits else self._split(document)
            if len(kept) + len(missing) > _MOST_KEPT:
                self._kept = kept = {}
            kept.update((key, found[key]) for key in missing)
        return [found[key] for key in keys]

    def passages(self, document: Document, split: Split) -> list[Passage]:
        """Give the passages of a document.

        Args:
            document: the document.
            split: its `Split`.
        """
        if split.title is None:
            return [Passage(document, *split.spans[0])]
        text = own_text(document)
        return [Passage(_titled(split.title, text[start:end]), start, end) for start, end in split.spans]

    def parts(self, documents: Sequence[Document]) -> list[Document]:
        """Give the passages of all documents, one document after the other, as the prompt takes them."""
        pairs = zip(documents, self.splits(documents), strict=True)
        return [passage.document for pair in pairs for passage in self.passages(*pair)]

    def _split(self, document: Document) -> Split:
        text = own_text(document)
        title, cut = self._short_title(document)
        room = self.tokens - (self._lengths([{"title": title, "text": ""}])[0] if title else self._overhead)
        spans, long_sentences = self._units(text, room - _MARGIN)
        gaps = [text[end:start] for (_, end), (start, _) in pairwise(spans)]  # such as line breaks and indentation
        word, *longer = self._lengths(
            ["a", *(f"a{gap}{text[a:b]}" for gap, (a, b) in zip(gaps, spans[1:], strict=True))]
        )
        counts = [*self._counts(text, spans[:1]), *(length - word for length in longer)]
        ends = {place for place, gap in enumerate(gaps, start=1) if gap.count("\n") > 1}

        def excess(first: int, last: int) -> int:
            part = _titled(title, text[spans[first][0] : spans[last - 1][1]])
            return self._lengths([part])[0] - self.tokens

        packed = pack(counts, room, self.stride, ends, excess)
        passages = tuple((spans[first][0], spans[last - 1][1]) for first, last in packed)
        return Split(title, passages or ((0, len(text)),), long_sentences, cut)

    def _short_title(self, document: Document) -> tuple[str, bool]:
        """Return the title, and whether it was cut to half a passage."""
        title = "" if isinstance(document, str) else (document.get("title") or "").strip()

        def length(end: int) -> int:
            return self._lengths([title[:end]])[0] - self._overhead

        words = [end for _, end in word_spans(title, (0, len(title)))]
        for ends in (words, range(1, words[0]) if words else ()):  # between characters, if no word fits
            if fitting := bisect_right(ends, self.tokens // 2, key=length):
                return title[: ends[fitting - 1]], fitting < len(words) or ends is not words
        return "", bool(title)

    def _units(self, text: str, room: int) -> tuple[list[Span], int]:
        """Split a text into sentences, and those that have more tokens than ``room`` into words.

        Returns: the spans, and how many sentences were too long.
        """
        spans = sentence_spans(text)
        counts = self._counts(text, spans)
        too_long = sum(count > room for count in counts)
        for finer in chain([word_spans], repeat(_halves)):
            if not any(count > room and end - start > 1 for (start, end), count in zip(spans, counts, strict=True)):
                break
            parts = [finer(text, span) if n > room else [span] for span, n in zip(spans, counts, strict=True)]
            spans = [span for part in parts for span in part]
            counts = self._counts(text, spans)
        return spans, too_long

    def _counts(self, text: str, spans: Sequence[Span]) -> list[int]:
        return [length - self._overhead for length in self._lengths([text[start:end] for start, end in spans])]

    def _lengths(self, documents: Sequence[Document]) -> list[int]:
        """Count the tokens of documents as the limit counts them, whatever their length."""
        limit = self.prompt.max_document_tokens
        prefixes = self.prompt.documents(documents)
        return [limit + prefix.cut if prefix.cut else prefix.end - prefix.start for prefix in prefixes]


def check_passages(
    passages: str | None = None,
    passage_tokens: int | None = None,
    passage_stride: int | None = None,
    limit: int | None = None,
) -> None:
    """Check the options for passages.

    Args:
        passages, passage_tokens, passage_stride: as for `Reranker`.
        limit: ``max_document_tokens``; None: it is not known yet, so that lengths are not checked.
    Raises: ValueError for another word than those in `PASSAGES`, for tokens or a stride without one, and as `Splitter`.
    """
    if passages is not None and passages not in PASSAGES:
        raise ValueError(f"passages must be {', '.join(PASSAGES[:-1])} or {PASSAGES[-1]}, got {passages!r}")
    for name, value in (("passage_tokens", passage_tokens), ("passage_stride", passage_stride)):
        if passages is None and value is not None:
            raise ValueError(f"{name} is of no use without passages; give passages={PASSAGES[0]!r}, or leave it out")
    if passages is not None and limit is not None:
        _checked_lengths(passage_tokens, passage_stride, limit)


def _checked_lengths(tokens: int | None, stride: int | None, limit: int) -> tuple[int, int]:
    """Check tokens and stride, and fill in their defaults; ``limit`` is ``max_document_tokens``."""
    longest = whole_number(tokens, "passage_tokens", LEAST_TOKENS) or limit
    step = whole_number(stride, "passage_stride") or longest
    if longest > limit:
        raise ValueError(
            f"passage_tokens must be at most max_document_tokens = {limit}, got {longest}; lower it, or raise "
            "max_document_tokens"
        )
    if longest < LEAST_TOKENS:
        raise ValueError(f"passages need max_document_tokens of at least {LEAST_TOKENS}, got {limit}")
    if step > longest:
        raise ValueError(
            f"passage_stride must be at most passage_tokens = {longest}, got {step}; otherwise text between passages "
            "would be left out"
        )
    return longest, step


def pack(
    counts: Sequence[int],
    room: int,
    stride: int,
    ends: Set[int] = frozenset(),
    excess: Callable[[int, int], int] = lambda first, last: 0,
) -> list[tuple[int, int]]:
    """Put units of a text, such as sentences, into passages.

    Args:
        counts: the tokens of each unit.
        room: tokens that a passage has room for; a unit that is longer is a passage of its own.
        stride: tokens from the beginning of a passage to that of the next one, which begins at the latest behind it.
        ends: places of units before which a paragraph ends; a passage that would go on behind one ends there, if it is
            at least half full by then.
        excess: the tokens that a passage (first, last) has too many when its units are joined; 0 or less if none.
    Returns: for each passage the place of its first unit, and the place behind its last.
    """
    passages, first = [], 0
    while first < len(counts):
        last, total, end = first + 1, counts[first], None
        while last < len(counts) and total + counts[last] <= room:
            end = last if last in ends and 2 * total >= room else end
            total, last = total + counts[last], last + 1
        if end is not None and last < len(counts) and last not in ends:
            last = end
        while last > first + 1 and (over := excess(first, last)) > 0:
            while last > first + 1 and over > 0:
                over, last = over - counts[last - 1], last - 1
        passages.append((first, last))
        if last == len(counts):
            break
        moved, first = counts[first], first + 1
        while first < last and moved < stride:
            moved, first = moved + counts[first], first + 1
    return passages


def own_text(document: Document) -> str:
    """Return the document's own text: the string, or "text" of the dict."""
    return document if isinstance(document, str) else document["text"]


def _titled(title: str, text: str) -> Document:
    return {"title": title, "text": text} if title else text


def _halves(text: str, span: Span) -> list[Span]:
    """Split a part of a text in the middle; a single character stays."""
    start, end = span
    middle = (start + end) // 2
    return [part for part in (stripped(text, start, middle), stripped(text, middle, end)) if part[0] < part[1]]


def _key(document: Document) -> bytes:
    """Return what tells documents apart: title and text."""
    title = "" if isinstance(document, str) else document.get("title") or ""
    return hashlib.sha256(f"{len(title)} {title}{own_text(document)}".encode()).digest()[:16]
