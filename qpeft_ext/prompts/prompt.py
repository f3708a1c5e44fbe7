"""The prompt: a document prefix that never sees the query, and a query suffix.

    <bos> {instruction} Passage: {title} {text}\\n  |  hints: <clue vectors>\\nQuestion: {query}

The words are those of a template (`templates`). The special tokens before them are those that the tokenizer puts before
a text (`special_tokens`). With ``num_virtual_tokens`` a trained soft prompt takes the place of the instruction.

The encoder of an encoder–decoder LM reads all but the query, between the special tokens that the tokenizer puts around
a text (T5: ``</s>`` at the end); the decoder reads the query.

An instruction of one query stands in the suffix, before "Question:", so that prefixes do not depend on it either:

    <bos> {instruction} Passage: {title} {text}\\n  |  Instruction: {instruction of the query}\\nQuestion: {query}

The pieces are tokenised separately. So the ids of a prefix depend on its document only, and the place of every span is
known without searching for token ids.

Documents and queries are text: the words of a special token in them (``</s>``, ``<|im_start|>``) are tokenised as any
other words, unless ``allow_special_tokens``. In an instruction they are special tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from ..config import QPeftConfig
from ..utils.inputs import as_list, expect_text, kind_of, short
from ..utils.text_tokens import TextTokenizer
from ..utils.words import counted
from .answers import answer_tokens, asked_text
from .pieces import CluesFirstPieces, DocumentPrefix, SuffixPieces
from .recent import RecentDocuments
from .special_tokens import choose
from .templates import pieces_of
from .templates.base import TemplatePieces, for_encoder_decoder
from .templates.words import Words

Document = str | dict
_RECENT_TOKENS = 1 << 18  # of the documents that are not tokenised again: about 10 MB
MAX_INSTRUCTION_TOKENS = 256  # of an instruction of one query: as many as a document has by default


class Prompt:
    """Turns documents and queries into token ids.

    Args:
        tokenizer: a transformers tokenizer; a pad token is not needed.
        config: `QPeftConfig` (template, layout, special_tokens, instruction, num_virtual_tokens, allow_special_tokens,
            the two length limits, and whether there are clues).
        encoder_decoder: whether the LM is an encoder–decoder.
        with_words: whether its head has a row for each word; a classifier's has not.

    Attributes:
        special_tokens: "tokenizer" or "bos", the option of the config with "auto" replaced.
        num_embeddings: number of rows of the LM's embedding table; None: not known yet (`expect_rows`).
        soft_prompt_start: the place of the soft prompt in every prefix, if there is one.
        instruction_ids: the tokens that the soft prompt replaces; () without one.
        suffix: the fixed pieces around clues and query.
        answers: the tokens of each answer that can be read behind a query (`answer_tokens`); () where none is.
        query_first: whether a query stands before its documents, so that it is shared by them (`WordedPrompt`).
        why_no_instruction: why a query cannot have an instruction of its own; "" where it can.

    Raises: ValueError for a template that cannot be made with this tokenizer.
    """

    query_first = False

    def __init__(
        self, tokenizer: Any, config: QPeftConfig, encoder_decoder: bool = False, with_words: bool = True
    ) -> None:
        self.tokenizer = tokenizer
        self.encoder_decoder = encoder_decoder
        self.max_document_tokens = config.max_document_tokens
        self.max_query_tokens = config.max_query_tokens
        self._recent = RecentDocuments(max(1, _RECENT_TOKENS // config.max_document_tokens))
        self.allow_special_tokens = config.allow_special_tokens
        self.special_tokens = choose(config.special_tokens, encoder_decoder)
        self.num_embeddings: int | None = None
        self._num_scored: int | None = None
        self._with_words = with_words
        self._text_tokenizer = TextTokenizer(tokenizer, config.allow_special_tokens)
        self._words = Words(tokenizer, self.special_tokens)
        self.why_no_instruction = ""
        pieces = self._make_pieces(config)
        if encoder_decoder:
            pieces = for_encoder_decoder(pieces, self._words, config)
        self._head, self._tail = pieces.head, pieces.tail
        self.suffix = _asking(pieces, self._words, config)
        self.answers = answer_tokens(tokenizer, config) if with_words else ()
        self.instruction_ids, self.soft_prompt_start = pieces.instruction_ids, pieces.soft_prompt_start
        self._query_follows_word, self._around_instruction = pieces.query_follows_word, pieces.around_instruction
        if encoder_decoder:
            self.why_no_instruction = "the encoder of an encoder–decoder LM would read it with the document"

    def _make_pieces(self, config: QPeftConfig) -> TemplatePieces:
        """Make the fixed pieces of the template, and find out whether it has a place for instructions of queries."""
        pieces = pieces_of(self._words, config)
        if pieces.around_instruction is None:
            self.why_no_instruction = f"template={config.template!r} is a fixed text without a place for it"
        return pieces

    def expect_rows(self, num_embeddings: int, num_scored: int | None = None) -> None:
        """Check from now on that every token id has a row in the embedding table, and in the head if it is scored.

        Args:
            num_embeddings: rows of the table.
            num_scored: rows of the head; None: as many, or it has no words.
        Raises: ValueError if a token of the template has none; `documents` and `queries` raise it for texts.
        """
        self.num_embeddings, self._num_scored = num_embeddings, num_scored if self._with_words else None
        self._recent.clear()  # they have not been checked
        suffix = [piece for piece in vars(self.suffix).values() if isinstance(piece, tuple)]
        pieces = [self._head, self._tail, self.instruction_ids, *suffix, *self.answers]
        self._expect_known("the prompt's template", [i for piece in pieces for i in piece])
        answers = [i for answer in self.answers for i in answer]
        self._expect_scored("the prompt's template", (*self.suffix.scored(()), *answers))

    def _expect_scored(self, place: str, ids: Sequence[int]) -> None:
        if self._num_scored is not None and ids and max(ids) >= self._num_scored:
            unscored = next(i for i in ids if i >= self._num_scored)
            token = short(self.tokenizer.convert_ids_to_tokens(unscored))
            raise ValueError(
                f"{place} has the token {token} with the id {unscored}, which the LM reads and cannot "
                f"score: its head has {self._num_scored} rows; leave the token out, or give the head a row "
                "for it (lm.resize_token_embeddings)"
            )

    def _expect_known(self, place: str, ids: Sequence[int]) -> None:
        if self.num_embeddings is not None and ids and max(ids) >= self.num_embeddings:
            unknown = next(i for i in ids if i >= self.num_embeddings)
            token, needed = short(self.tokenizer.convert_ids_to_tokens(unknown)), len(self.tokenizer)
            raise ValueError(
                f"{place} has the token {token} with the id {unknown}, but the LM's embedding table has "
                f"{self.num_embeddings} rows; call lm.resize_token_embeddings({needed}) first, or "
                "use the LM's own tokenizer"
            )

    @property
    def least_tokens(self) -> int:
        """Tokens that the LM reads of the shortest prompt: an empty document, no clue and a query of one token."""
        return len(self._head) + len(self._tail) + self.suffix.least_tokens + len(self.suffix.asked or ())

    def documents(self, documents: Sequence[Document]) -> list[DocumentPrefix]:
        """Make the prefixes of documents; only a document's own text is ever truncated, at its end."""
        return self._recent.prefixes([document_text(document) for document in documents], self._prefixes_of)

    def _prefixes_of(self, texts: Sequence[str]) -> list[DocumentPrefix]:
        """Make the prefixes of texts that are not known."""
        prefixes = []
        for text, ids in zip(texts, self._encode_documents(texts), strict=True):
            kept = ids[: self.max_document_tokens]
            self._expect_known(f"the document {short(text)}", kept)
            start = len(self._head)
            whole = (*self._head, *kept, *self._tail)
            prefixes.append(DocumentPrefix(whole, start, start + len(kept), len(ids) - len(kept)))
        return prefixes

    def _encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise documents of any length, each as a text that stands in a prompt."""
        return self._text_tokenizer([self._spaced_document(text) for text in texts])

    def _spaced_document(self, text: str) -> str:
        return self.spaced(text)

    def queries(self, queries: Sequence[str], cut: list[int] | None = None) -> list[tuple[int, ...]]:
        """Tokenise queries.

        Args:
            queries: strings.
            cut: if a list is given, queries that are longer than ``max_query_tokens`` are cut at their end and their
                places are added to it; without one they are an error.
        Raises: TypeError if a query is not a string; ValueError if it is empty or too long, or has a token that the
            LM does not have.
        """
        for place, query in enumerate(queries):
            expect_text(query, f"query {place}")
        encoded = self._encode_queries(queries)
        for place, (query, ids) in enumerate(zip(queries, encoded, strict=True)):
            if not query.strip() or not ids:
                raise ValueError(f"a query must have at least one token, got {query!r}")
            if len(ids) > self.max_query_tokens:
                if cut is None:
                    raise ValueError(
                        f"query {short(query)} has {len(ids)} tokens, max_query_tokens is {self.max_query_tokens}; "
                        "shorten the query, raise max_query_tokens or set truncate_queries"
                    )
                del ids[self.max_query_tokens :]
                cut.append(place)
            self._expect_known(f"the query {short(query)}", ids)
            self._expect_scored(f"the query {short(query)}", self.suffix.scored(tuple(ids)))
        return [tuple(ids) for ids in encoded]

    def instructed(self, instruction: str) -> SuffixPieces | CluesFirstPieces:
        """Make the pieces of `suffix` with an instruction before the question; nothing of it is scored.

        Args:
            instruction: text; it is tokenised as the text of a query is.
        Raises: TypeError if it is not a string; ValueError if it is empty or too long, or where a prompt has no place
            for one.
        """
        around = self._around_instruction
        if self.why_no_instruction or around is None:
            raise ValueError(f"instruction: {self.why_no_instruction}; leave instruction out")
        text = self._checked_instruction(instruction)
        (words,) = self._text_tokenizer([self.spaced(text)])
        if len(words) > MAX_INSTRUCTION_TOKENS:
            raise ValueError(
                f"instruction {short(text)} must have at most {MAX_INSTRUCTION_TOKENS} tokens, got {len(words)}"
            )
        self._expect_known(f"the instruction {short(text)}", words)
        bare_question = (*around.bare, *words, *around.question)
        if isinstance(self.suffix, CluesFirstPieces):
            return replace(self.suffix, question=bare_question)
        question = (*around.behind_clues, *words, *around.question)
        return replace(self.suffix, question=question, bare_question=bare_question)

    @staticmethod
    def _checked_instruction(instruction: object) -> str:
        text = expect_text(instruction, "instruction").strip()
        if not text:
            raise ValueError(f"instruction must have at least one token, got {instruction!r}; None is no instruction")
        return text

    def count(self, query: str) -> int:
        """Count the tokens of a query of any length, also of an empty one."""
        return len(self._encode_queries([query])[0])

    def fits(self, query: str) -> bool:
        """Tell whether `queries` accepts a query of this length."""
        return 0 < self.count(query) <= self.max_query_tokens

    def _encode_queries(self, queries: Sequence[str]) -> list[list[int]]:
        """Tokenise queries of any length, each as a text that follows a prompt or begins what a decoder writes."""
        texts = [query.strip() for query in queries]
        if self.encoder_decoder:
            return self._text_tokenizer(texts)
        if self._query_follows_word:
            return self._text_tokenizer([self.spaced(text) for text in texts])
        return self._text_tokenizer.continued(texts, "\n")

    def spaced(self, text: str) -> str:
        """Return the text to tokenise for one that follows a word and a space, as a query does."""
        return self._words.spaced(text)

    def offsets(self, document: Document) -> list[tuple[int, int]]:
        """Find the character spans of a document's tokens in `document_text`, in the order of ``document_ids``.

        Raises: ValueError for a tokenizer that cannot give offsets (a slow one).
        """
        text = document_text(document)
        spaced = self._spaced_document(text)
        shift = len(spaced) - len(text)
        offsets = self._text_tokenizer.offsets(spaced)[: self.max_document_tokens]
        return [(max(0, start - shift), max(0, end - shift)) for start, end in offsets]


def _asking(pieces: TemplatePieces, words: Words, config: QPeftConfig) -> SuffixPieces | CluesFirstPieces:
    """Make the pieces around a query, with what asks for an answer behind it where the score is one."""
    if pieces.suffix.asked is not None:  # a template that asks itself
        return replace(pieces.suffix, scores_query=config.score == "both")
    text = asked_text(config)
    if text and pieces.query_is_answer:
        raise ValueError(
            f"QPeftConfig: score={config.score!r} asks behind the query, which template={config.template!r} has as the "
            "answer of the LM; use template='qpeft'"
        )
    if not text:
        return pieces.suffix
    return replace(pieces.suffix, asked=words.continued(f"\n{text}"), scores_query=config.score == "both")


def document_text(document: Document, place: str = "a document") -> str:
    """Join title and text of a document, title first.

    Args:
        document: a string, or a dict with "text" and perhaps "title".
        place: what an error calls it, such as "document 5 of query 0".
    Raises: TypeError if it is neither a string nor a dict with a string ``text`` (and a string ``title``); ValueError
        for half a surrogate pair, which no tokenizer takes.
    """
    if isinstance(document, str):
        return expect_text(document, place).strip()
    if not isinstance(document, dict) or not isinstance(document.get("text"), str):
        got = kind_of(document)
        if isinstance(document, dict) and "text" in document:
            got = f"a dict whose 'text' is {kind_of(document['text'])}"
        elif isinstance(document, (bytes, bytearray)):
            got += "; decode it: document.decode('utf-8')"
        raise TypeError(f"{place} must be a string or a dict with a string 'text', got {got}")
    title = document.get("title") or ""
    if not isinstance(title, str):
        raise TypeError(f"the title of {place} must be a string, got {kind_of(title)}")
    return expect_text(f"{title} {document['text']}".strip(), place)


def expect_query(query: str, place: str) -> str:
    """Return the query itself. Raises: as `expect_text`; ValueError if it is empty."""
    if not expect_text(query, place).strip():
        raise ValueError(f"{place} must have at least one token, got {short(query)}")
    return query


def as_documents(documents: Iterable[Document], what: str, of: str = "") -> list[Document]:
    """Read the documents of a query once, and check each.

    Args:
        documents: what a user gave.
        what: what errors about the list begin with, such as "rank: documents".
        of: what follows "document 5" in an error, such as " of query 3".
    Raises: as `as_list` and `document_text`.
    """
    checked = as_list(documents, what, "one document goes into a list: [document]")
    for place, document in enumerate(checked):
        document_text(document, f"document {place}{of}")
    return checked


def as_pairs(pairs: Iterable[Any], what: str) -> list[tuple[str, Document]]:
    """Read (query, document) pairs once, and check each.

    Args:
        pairs: what a user gave.
        what: what errors begin with.
    Raises: TypeError or ValueError that begins with ``what`` or names the pair.
    """
    checked = []
    for place, pair in enumerate(as_list(pairs, what, "pairs are a list: [(query, document), …]")):
        if isinstance(pair, (str, bytes, dict)) or not hasattr(pair, "__len__"):
            raise TypeError(f"{what} takes (query, document) pairs, but pair {place} is {kind_of(pair)}")
        if len(pair) != 2:
            items = counted(len(pair), "items")
            raise ValueError(f"{what} takes (query, document) pairs, but pair {place} has {items}")
        query, document = pair
        expect_query(query, f"the query of pair {place}")
        document_text(document, f"the document of pair {place}")
        checked.append((query, document))
    return checked
