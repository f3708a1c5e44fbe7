"""The prompt: a document prefix that never sees the query, and a query suffix.

    <bos> {instruction} Passage: {title} {text}\\n  |  hints: <clue vectors>\\nQuestion: {query}

The pieces are tokenised separately, so the ids of a prefix depend on its document alone, and every span is known
as a number: nothing is ever searched by token id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .config import QPeftConfig

Document = str | dict


@dataclass(frozen=True)
class DocumentPrefix:
    """Token ids of one document prefix.

    ids: the whole prefix.  start, end: the span of title and text in it.  cut: tokens lost to truncation.
    """

    ids: tuple[int, ...]
    start: int
    end: int
    cut: int

    @property
    def document_ids(self) -> tuple[int, ...]:
        return self.ids[self.start : self.end]


@dataclass(frozen=True)
class SuffixPieces:
    """The fixed pieces of the suffix: ``hints`` + clues + ``question``, or ``bare_question`` when there is no clue."""

    hints: tuple[int, ...]
    question: tuple[int, ...]
    bare_question: tuple[int, ...]


class Prompt:
    """Turns documents and queries into token ids.

    Args:
        tokenizer: a transformers tokenizer; a pad token is not needed.
        config: `QPeftConfig` (instruction and the two length limits are used).
    """

    def __init__(self, tokenizer, config: QPeftConfig) -> None:
        self.tokenizer = tokenizer
        self.max_document_tokens = config.max_document_tokens
        self.max_query_tokens = config.max_query_tokens
        # SentencePiece tokenizers put a space before each piece by themselves; byte-level ones need it in the text.
        first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"][:1])
        self._adds_space = bool(first) and first[0].startswith("▁")
        instruction = f"{config.instruction.strip()} Passage:" if config.instruction.strip() else "Passage:"
        bos = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
        self._head = (*bos, *self._encode([instruction])[0])
        self._newline = tuple(self._encode(["\n"])[0])
        hints, question, bare = self._encode(["hints:", "\nQuestion:", "Question:"])
        self.suffix = SuffixPieces(tuple(hints), tuple(question), tuple(bare))

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: a long document is cut by us, so the tokenizer's length warning would be noise
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _spaced(self, text: str) -> str:
        return text if self._adds_space or not text else f" {text}"

    def documents(self, documents: Sequence[Document]) -> list[DocumentPrefix]:
        """Prefixes of the documents; only a document's own text is ever truncated, at its end."""
        prefixes = []
        for ids in self._encode([self._spaced(document_text(document)) for document in documents]):
            kept = ids[: self.max_document_tokens]
            start = len(self._head)
            whole = (*self._head, *kept, *self._newline)
            prefixes.append(DocumentPrefix(whole, start, start + len(kept), len(ids) - len(kept)))
        return prefixes

    def queries(self, queries: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids of the queries.

        Raises: TypeError if a query is not a string; ValueError if it is empty or longer than ``max_query_tokens``.
        """
        for query in queries:
            if not isinstance(query, str):
                raise TypeError(f"a query must be a string, got {type(query).__name__}: {_short(query)}")
        encoded = self._encode([self._spaced(query.strip()) for query in queries])
        for query, ids in zip(queries, encoded, strict=True):
            if not query.strip() or not ids:
                raise ValueError(f"a query must have at least one token, got {query!r}")
            if len(ids) > self.max_query_tokens:
                raise ValueError(
                    f"query {_short(query)} has {len(ids)} tokens, max_query_tokens is {self.max_query_tokens}; "
                    "shorten the query or raise max_query_tokens"
                )
        return [tuple(ids) for ids in encoded]

    def count(self, query: str) -> int:
        """Tokens of a query of any length, also of none."""
        return len(self._encode([self._spaced(query.strip())])[0])

    def fits(self, query: str) -> bool:
        """Whether `queries` takes it."""
        return 0 < self.count(query) <= self.max_query_tokens

    def offsets(self, document: Document) -> list[tuple[int, int]]:
        """Character spans of the document tokens in `document_text`, in the order of ``document_ids``.

        Raises: ValueError for a tokenizer that cannot give offsets (a slow one).
        """
        if not self.tokenizer.is_fast:
            raise ValueError("character offsets need a fast tokenizer; load it with use_fast=True")
        text = document_text(document)
        spaced = self._spaced(text)
        shift = len(spaced) - len(text)
        spans = self.tokenizer(spaced, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = spans["offset_mapping"][: self.max_document_tokens]
        return [(max(0, start - shift), max(0, end - shift)) for start, end in offsets]


def document_text(document: Document) -> str:
    """Title and text of a document as one string, title first.

    Raises: TypeError if it is neither a string nor a mapping with a string ``text``.
    """
    if isinstance(document, str):
        return document.strip()
    if not isinstance(document, dict) or not isinstance(document.get("text"), str):
        raise TypeError(f"a document must be a string or a dict with a string 'text', got {_short(document)}")
    title = document.get("title") or ""
    if not isinstance(title, str):
        raise TypeError(f"a document's title must be a string, got {_short(title)}")
    return f"{title} {document['text']}".strip()


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
