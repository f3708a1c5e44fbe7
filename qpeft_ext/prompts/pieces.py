"""The pieces of a prompt as token ids: the prefix of a document, and the fixed tokens around clues and query."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DocumentPrefix:
    """Token ids of one document prefix; with ``layout="clues_first"`` of the piece that follows the clues.

    ids: the whole prefix, with 0 for each token of a soft prompt.
    start, end: the span that clues come from: title and text.
    cut: the number of tokens lost to truncation.
    """

    ids: tuple[int, ...]
    start: int
    end: int
    cut: int

    @property
    def document_ids(self) -> tuple[int, ...]:
        return self.ids[self.start : self.end]


@dataclass(frozen=True, kw_only=True)
class _AroundTheQuery:
    """Tokens around a query.

    given: tokens that the decoder of an encoder–decoder LM reads first.
    scored_before, scored_after: tokens that are scored with the query.
    asked: tokens behind the query, after which an answer is read; None: the query itself is scored.
    scores_query: whether the query is scored also where an answer is read.
    """

    given: tuple[int, ...] = ()
    scored_before: tuple[int, ...] = ()
    scored_after: tuple[int, ...] = ()
    asked: tuple[int, ...] | None = None
    scores_query: bool = False

    def scored(self, query: tuple[int, ...]) -> tuple[int, ...]:
        """Give the tokens whose likelihood is the score; () where only an answer is read."""
        return self._whole(query) if self.asked is None or self.scores_query else ()

    def last(self, query: tuple[int, ...]) -> tuple[int, ...]:
        """Give the tokens that end a prompt, behind those of `lay_out`."""
        return (*self._whole(query), *(self.asked or ()))

    def _whole(self, query: tuple[int, ...]) -> tuple[int, ...]:
        return (*self.scored_before, *query, *self.scored_after)

    def read(self, query: tuple[int, ...]) -> tuple[int, ...]:
        """Give those tokens of `last` that the LM reads: a scored one at the end is only a target."""
        return self.last(query)[:-1] if self.asked is None else self.last(query)


@dataclass(frozen=True)
class SuffixPieces(_AroundTheQuery):
    """The fixed pieces of the suffix: ``hints`` + clues + ``question``, or ``bare_question`` when there is no clue."""

    hints: tuple[int, ...]
    question: tuple[int, ...]
    bare_question: tuple[int, ...]

    @property
    def least_tokens(self) -> int:
        """Tokens of a suffix without clue and query."""
        return len(self.bare_question)

    def lay_out(self, document: tuple[int, ...], clues: int) -> tuple[tuple[int, ...], int, int]:
        """Lay out a prompt up to its query.

        Args:
            document: ids of the prefix; () for a suffix.
            clues: the number of clues.
        Returns: the ids, with 0 in each slot of a clue; where these slots begin; where the document prefix ends.
        """
        if not clues:
            return document + self.bare_question, len(document), len(document)
        ids = (*document, *self.hints, *(0,) * clues, *self.question)
        return ids, len(document) + len(self.hints), len(document)


@dataclass(frozen=True)
class CluesFirstPieces(_AroundTheQuery):
    """The fixed pieces of ``layout="clues_first"``.

    A prompt is ``head`` + ``hints`` + clues + ``newline`` + document + ``question``. Without a clue there are neither
    ``hints`` nor ``newline``.
    """

    head: tuple[int, ...]
    hints: tuple[int, ...]
    newline: tuple[int, ...]
    question: tuple[int, ...]

    @property
    def least_tokens(self) -> int:
        """Tokens around a document without clue and query."""
        return len(self.head) + len(self.question)

    def lay_out(self, document: tuple[int, ...], clues: int) -> tuple[tuple[int, ...], int, int]:
        framed = (*self.hints, *(0,) * clues, *self.newline) if clues else ()
        ids = (*self.head, *framed, *document, *self.question)
        return ids, len(self.head) + len(self.hints), len(ids) - len(self.question)
