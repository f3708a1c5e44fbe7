"""The official prompt, for Llama's tokenizer.

    <s> {instruction} Passage: {title} {text} \\n  |  hints: <clue vectors> \\n  Question: \\n <s> {query} </s>

With ``layout="clues_first"`` the hints stand before "Passage:". The clue module also makes the vectors of
the words around the clues, so they are slots like clues, and the prompt has no piece for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..config import QPeftConfig
from ..prompts.pieces import CluesFirstPieces, DocumentPrefix, SuffixPieces
from ..prompts.prompt import Document, Prompt, document_text
from ..utils.inputs import short

BOS, EOS = 1, 2  # fixed in the official code
_BEFORE = "Passage: "
QUESTION = 4  # tokens of " Question: \n" at the end of the document part; the hints are put before them


@dataclass(frozen=True)
class OfficialTokens:
    """Template words that the clue modules read.

    hints, newline: around the clues.
    question: after the document; these tokens may become clues.
    """

    hints: tuple[int, ...]
    newline: tuple[int, ...]
    question: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> OfficialTokens:
        """Tokenise the words. Raises: ValueError for a tokenizer unlike Llama's, with which the official code fails."""
        found = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        if found != (BOS, EOS):
            raise ValueError(
                f"compat='official' needs a Llama tokenizer with <s> = {BOS} and </s> = {EOS}, got "
                f"bos_token_id {found[0]} and eos_token_id {found[1]}; use compat='none'"
            )
        part, hints, newline = tokenizer([_document_part("a"), "hints: ", "\n"], add_special_tokens=False)["input_ids"]
        pieces = tokenizer.convert_ids_to_tokens(part[-QUESTION:])
        if pieces[:3] != ["▁Question", ":", "▁"]:
            raise ValueError(
                "compat='official' needs a Llama tokenizer, whose document part ends with four pieces for "
                f"'Question: \\n', got {pieces}; use compat='none'"
            )
        return cls(tuple(hints), tuple(newline), tuple(part[-QUESTION:]))


class OfficialPrompt(Prompt):
    """`Prompt` with the official template.

    ``max_document_tokens`` counts the tokens of "Passage: {title} {text} \\n Question: \\n". Of a longer one the first
    piece and the end are kept, so the title and the beginning of the text are lost. (The official limit of 300 is one
    for document part, BOS, query and EOS together; here it does not depend on the query, so that prefixes can be
    shared.) The span of a `DocumentPrefix` is all of this except "Question: \\n": template words may become clues.

    Raises: ValueError for a tokenizer that is not Llama's.
    """

    def __init__(self, tokenizer: Any, config: QPeftConfig) -> None:
        super().__init__(tokenizer, config)
        self.tokens = OfficialTokens.of(tokenizer)
        self.why_no_instruction = "compat='official' has the prompt of the official code, without a place for it"
        head = (BOS, *self._words(config.instruction)[0])
        scored: dict[str, Any] = {"scored_before": (BOS,), "scored_after": (EOS,)}
        if config.layout == "clues_first":
            self._head = ()
            self.suffix = CluesFirstPieces(head, (), (), self.tokens.question, **scored)
        else:
            self._head = head
            self.suffix = SuffixPieces((), self.tokens.question, self.tokens.question, **scored)

    def documents(self, documents: Sequence[Document]) -> list[DocumentPrefix]:
        """Make the prefixes of documents, or the pieces after the hints.

        Raises: ValueError for a document with the text of a token "<s>", which the official code takes for the
            beginning of the query.
        """
        texts = [document_text(document) for document in documents]
        prefixes = []
        for text, ids in zip(texts, self._text_tokenizer([_document_part(text) for text in texts]), strict=True):
            self._expect_no_bos("document", text, ids)
            kept = self._cut(ids)[:-QUESTION]
            self._expect_known(f"the document {short(text)}", kept)
            start = len(self._head)
            whole = (*self._head, *kept)
            prefixes.append(DocumentPrefix(whole, start, len(whole), len(ids) - QUESTION - len(kept)))
        return prefixes

    def queries(self, queries: Sequence[str], cut: list[int] | None = None) -> list[tuple[int, ...]]:
        """Tokenise queries like `Prompt.queries`.

        Raises also: ValueError for a query with the text of a token "<s>".
        """
        encoded = super().queries(queries, cut)
        for query, ids in zip(queries, encoded, strict=True):
            self._expect_no_bos("query", query, ids)
        return encoded

    def offsets(self, document: Document) -> list[tuple[int, int]]:
        """Find character spans like `Prompt.offsets`; words of the template have empty spans."""
        text = document_text(document)
        spans = self._text_tokenizer.offsets(_document_part(text))
        return [
            tuple(min(max(0, place - len(_BEFORE)), len(text)) for place in span)
            for span in self._cut(spans)[:-QUESTION]
        ]

    def _cut(self, part: list) -> list:
        excess = len(part) - self.max_document_tokens
        return part if excess <= 0 else part[:1] + part[1 + excess :]

    def _expect_no_bos(self, what: str, text: str, ids: Sequence[int]) -> None:
        if BOS in ids:
            raise ValueError(
                f"{what} {text[:60]!r} has the token <s> in its text, where the official code would split "
                "the prompt; take it out, or use compat='none'"
            )


def _document_part(text: str) -> str:
    return f"{_BEFORE}{text} \n Question: \n"
