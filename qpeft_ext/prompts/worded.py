"""Prompts of templates that are a text with places for query and document, in either order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import repeat
from typing import Any

from ..config import QPeftConfig
from ..config.rerankers import PAIR, RERANKERS
from ..utils.inputs import short
from ..utils.text_templates import Part, Place, parts_of
from .pieces import CluesFirstPieces, DocumentPrefix, SuffixPieces
from .prompt import MAX_INSTRUCTION_TOKENS, Prompt
from .special_tokens import special_tokens_of_pair
from .templates.base import TemplatePieces
from .wording import Fixed, Gap, tokenise


class WordedPrompt(Prompt):
    """Turns texts into token ids as a template that is a text says: one of `RERANKERS`, or a user's file.

    With ``layout="query_first"`` the query's part stands before the document, and is shared by all its candidates:
    `query_prefixes` makes it. A document is then a part of the suffix, and what the template writes behind it is asked.

    Args:
        tokenizer, config, encoder_decoder, with_words: as for `Prompt`.
    Attributes (and those of `Prompt`):
        query_first: whether the query stands before the document.
    Raises: ValueError for a template that cannot be used.
    """

    def __init__(
        self, tokenizer: Any, config: QPeftConfig, encoder_decoder: bool = False, with_words: bool = True
    ) -> None:
        self.query_first = config.layout == "query_first"
        known = RERANKERS.get(config.template)
        self._template = config.template if known is None else known.template
        self._instruction, self._is_pair = config.instruction, config.template == PAIR
        super().__init__(tokenizer, config, encoder_decoder, with_words)
        if not self.query_first:
            self.why_no_instruction = "this template's instruction is read with the document; set it in QPeftConfig"

    def _make_pieces(self, config: QPeftConfig) -> TemplatePieces:
        before, self._first, between, self._second, behind = self._split(parts_of(self._template, self._instruction))
        self._before, self._between = _ids(before), _ids(between)
        self._with_instruction: list[Fixed | Gap] | None = None
        if self.query_first:
            start, _, middle, _, end = self._split(parts_of(self._template, None))
            if any(isinstance(part, Gap) for part in (*start, *middle)):
                self._with_instruction = [*start, self._first, *middle]
            elif any(isinstance(part, Gap) for part in end):
                self.why_no_instruction = "it stands behind the document in this template"
            else:
                self.why_no_instruction = "this template has no place for it"
        asked = _ids(behind)
        if self.query_first:
            return TemplatePieces(head=(), tail=(), suffix=SuffixPieces((), (), (), asked=asked))
        suffix = SuffixPieces((), self._between, self._between, asked=asked or None)
        return TemplatePieces(head=self._before, tail=(), suffix=suffix)

    def _split(self, parts: Sequence[Part]) -> tuple[list[Fixed | Gap], Gap, list[Fixed | Gap], Gap, list[Fixed | Gap]]:
        """Tokenise what a template writes: before the first text, its gap, between, the other gap, and behind."""
        made = tokenise(parts, self._words)
        if self._is_pair:
            before, between, behind = special_tokens_of_pair(self.tokenizer)
            made = [before, *(part for part in made if isinstance(part, Gap)), behind]
            made.insert(2, between)
        gaps = [i for i, part in enumerate(made) if isinstance(part, Gap) and part.place is not Place.INSTRUCTION]
        first, second = (made[i] for i in gaps)
        assert isinstance(first, Gap) and isinstance(second, Gap), "as `parts_of` found them"
        return made[: gaps[0]], first, made[gaps[0] + 1 : gaps[1]], second, made[gaps[1] + 1 :]

    @property
    def _query_gap(self) -> Gap:
        return self._first if self.query_first else self._second

    @property
    def _document_gap(self) -> Gap:
        return self._second if self.query_first else self._first

    @property
    def least_tokens(self) -> int:
        own = len(self._before) + len(self._between) if self.query_first else 0
        return super().least_tokens + own

    def expect_rows(self, num_embeddings: int, num_scored: int | None = None) -> None:
        super().expect_rows(num_embeddings, num_scored)
        self._expect_known("the prompt's template", (*self._before, *self._between))

    def _encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        rows = self._document_gap.encode(texts, self._text_tokenizer, self._words)
        if self.query_first and not self.suffix.asked:  # then an answer needs a token of the document to follow
            rows = [ids or self._text_tokenizer([" "])[0] or [self.tokenizer.eos_token_id] for ids in rows]
        return rows

    def _spaced_document(self, text: str) -> str:
        return self.spaced(text) if self._document_gap.lead else text

    def _encode_queries(self, queries: Sequence[str]) -> list[list[int]]:
        texts = [query.strip() for query in queries]
        return replace(self._query_gap, ends="").encode(texts, self._text_tokenizer, self._words)

    def queries(self, queries: Sequence[str], cut: list[int] | None = None) -> list[tuple[int, ...]]:
        places: list[int] | None = None if cut is None else []
        encoded = super().queries(queries, places)
        if cut is not None:
            cut += places or ()
        if not self._query_gap.ends:
            return encoded
        joined = self._query_gap.encode([query.strip() for query in queries], self._text_tokenizer, self._words)
        ends = self._words.continued(self._query_gap.ends)
        return [(*encoded[i], *ends) if i in (places or ()) else tuple(ids) for i, ids in enumerate(joined)]

    def query_prefixes(
        self, queries: Sequence[tuple[int, ...]], instructions: Sequence[str | None] | None = None
    ) -> list[DocumentPrefix]:
        """Make what stands before a document, for each query; only with ``query_first``.

        Args:
            queries: of `queries`.
            instructions: the instruction of each, or None for that of the config.
        Returns: the prefixes; their span is that of the query.
        Raises: as `instructed`.
        """
        prefixes = []
        around: dict[str | None, tuple[Fixed, Fixed]] = {None: (self._before, self._between)}
        for query, instruction in zip(queries, instructions or repeat(None), strict=False):
            if instruction is not None and instruction not in around:
                around[instruction] = self._around(instruction)
            before, between = around[instruction]
            ids = (*before, *query, *between)
            prefixes.append(DocumentPrefix(ids, len(before), len(before) + len(query), 0))
        return prefixes

    def _around(self, instruction: str) -> tuple[Fixed, Fixed]:
        """Make the ids before a query and between query and document, with an instruction of the query's own."""
        if self._with_instruction is None:
            raise ValueError(f"instruction: {self.why_no_instruction}; leave instruction out")
        text = self._checked_instruction(instruction)
        before: list[int] = []
        between: list[int] = []
        ids = before
        for part in self._with_instruction:
            if isinstance(part, tuple):
                ids += part
            elif part.place is Place.QUERY:
                ids = between
            else:
                words = part.encode([text], self._text_tokenizer, self._words)[0]
                if len(words) > MAX_INSTRUCTION_TOKENS:
                    raise ValueError(
                        f"instruction {short(text)} must have at most {MAX_INSTRUCTION_TOKENS} tokens, got {len(words)}"
                    )
                self._expect_known(f"the instruction {short(text)}", words)
                ids += words
        return tuple(before), tuple(between)

    def instructed(self, instruction: str) -> SuffixPieces | CluesFirstPieces:
        """Give `suffix`, since an instruction stands before the query here, and check it. Raises: as `Prompt`."""
        self._around(instruction)
        return self.suffix


def _ids(parts: Sequence[Fixed | Gap]) -> Fixed:
    """Join fixed ids; gaps of an instruction count as nothing."""
    return tuple(i for part in parts if isinstance(part, tuple) for i in part)
