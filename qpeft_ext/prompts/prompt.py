"""The prompt: a document prefix that never sees the query, and a query suffix.

    <bos> {instruction} Passage: {title} {text}\\n  |  hints: <clue vectors>\\nQuestion: {query}

With ``num_virtual_tokens`` a trained soft prompt takes the place of the instruction. With ``template="upr"``:

    <bos> Passage: {title} {text}  |  hints: <clue vectors>. Please write a question based on this passage. {query}

With ``layout="clues_first"`` the clues stand before the document, and nothing can be shared:

    <bos> {instruction} hints: <clue vectors>\\n Passage: {title} {text}\\nQuestion: {query}

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
from .pieces import CluesFirstPieces, DocumentPrefix, SuffixPieces

Document = str | dict
MAX_INSTRUCTION_TOKENS = 256  # of an instruction of one query: as many as a document has by default
UPR_INSTRUCTION = ". Please write a question based on this passage."  # Sachan et al. 2022, arXiv 2204.07496


class Prompt:
    """Turns documents and queries into token ids.

    Args:
        tokenizer: a transformers tokenizer; a pad token is not needed.
        config: `QPeftConfig` (template, layout, instruction, num_virtual_tokens, allow_special_tokens, the two length
            limits, and whether there are clues).
        encoder_decoder: whether the LM is an encoder–decoder.

    Attributes:
        num_embeddings: number of rows of the LM's embedding table; None: not known yet (`expect_rows`).
        soft_prompt_start: the place of the soft prompt in every prefix, if there is one.
        instruction_ids: the tokens that the soft prompt replaces; () without one.
        suffix: the fixed pieces around clues and query.
        why_no_instruction: why a query cannot have an instruction of its own; "" where it can.
    """

    def __init__(self, tokenizer: Any, config: QPeftConfig, encoder_decoder: bool = False) -> None:
        self.tokenizer = tokenizer
        self.encoder_decoder = encoder_decoder
        self.max_document_tokens = config.max_document_tokens
        self.max_query_tokens = config.max_query_tokens
        self.allow_special_tokens = config.allow_special_tokens
        self._text_tokenizer = TextTokenizer(tokenizer, config.allow_special_tokens)
        self._template_tokenizer = TextTokenizer(tokenizer, special_tokens=True)
        self.num_embeddings: int | None = None
        # SentencePiece tokenizers put a space before each piece; byte-level ones need it in the text
        first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"][:1])
        self._adds_space = bool(first) and first[0].startswith("▁")
        if encoder_decoder:
            bos, eos = self._around()
        else:
            bos, eos = (() if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)), ()
        self.why_no_instruction = ""
        if encoder_decoder:
            self.why_no_instruction = "the encoder of an encoder–decoder LM would read it with the document"
        elif config.template != "qpeft":
            self.why_no_instruction = f"template={config.template!r} is a fixed text without a place for it"
        self.soft_prompt_start = len(bos)
        self.instruction_ids: tuple[int, ...] = ()
        self.suffix: SuffixPieces | CluesFirstPieces
        if config.layout == "clues_first":
            texts = [config.instruction.strip(), "\n", self._spaced("hints:"), "Question:", self._spaced("Passage:")]
            head, self._tail, hints, question, self._head = (tuple(ids) for ids in self._encode(texts))
            self.suffix = CluesFirstPieces(bos + head, hints, self._tail, question)
            return
        head, tail, hints, question, bare = self._pieces(config)
        around: dict[str, tuple[int, ...]] = {}
        if encoder_decoder:
            question, bare = question + eos, bare + eos
            if config.clues == "none":  # then the encoder's input depends on the document only
                tail, bare = tail + bare, ()
            upr = config.template == "upr"
            around = {"scored_before": bos, "scored_after": eos} if upr else {"given": bos}
        self.suffix = SuffixPieces(hints, question, bare, **around)
        self._head, self._tail = bos + head, tail

    def _pieces(self, config: QPeftConfig) -> tuple[tuple[int, ...], ...]:
        """Tokenise the pieces before the text, after it, before the clues, after them, and in the place of no clues."""
        if config.template == "upr":
            head, hints = self._encode(["Passage:", self._spaced("hints:")])
            question = self._continued(UPR_INSTRUCTION)
            pieces = [head, [], hints, question, question]
        else:
            instruction = config.instruction.strip()
            pieces = self._encode([f"{instruction} Passage:".strip(), "\n", "hints:", "\nQuestion:", "Question:"])
            if config.num_virtual_tokens is not None:
                words, passage = self._encode([instruction, self._spaced("Passage:")])
                self.instruction_ids = tuple(words)
                pieces[0] = [0] * config.num_virtual_tokens + passage
        return tuple(tuple(ids) for ids in pieces)

    def _continued(self, text: str) -> list[int]:
        """Tokenise a text that follows a word without a space."""
        word, both = self._encode(["a", f"a{text}"])
        return both[len(word) :] if both[: len(word)] == word else self._encode([text])[0]

    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Find the special tokens that the tokenizer puts before and after a text."""
        text, whole = self._encode(["a"])[0], self.tokenizer("a")["input_ids"]
        for start in range(len(whole) - len(text) + 1):
            if whole[start : start + len(text)] == text:
                return tuple(whole[:start]), tuple(whole[start + len(text) :])
        return (), ()

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Tokenise pieces of the template."""
        return self._template_tokenizer(texts)

    def expect_rows(self, num_embeddings: int) -> None:
        """Check from now on that every token id has a row in an embedding table of this length.

        Raises: ValueError if a token of the template has none; `documents` and `queries` raise it for texts.
        """
        self.num_embeddings = num_embeddings
        pieces = [self._head, self._tail, self.instruction_ids, *vars(self.suffix).values()]
        self._expect_known("the prompt's template", [i for piece in pieces for i in piece])

    def _expect_known(self, place: str, ids: Sequence[int]) -> None:
        if self.num_embeddings is not None and ids and max(ids) >= self.num_embeddings:
            unknown = next(i for i in ids if i >= self.num_embeddings)
            token, needed = short(self.tokenizer.convert_ids_to_tokens(unknown)), len(self.tokenizer)
            raise ValueError(
                f"{place} has the token {token} with the id {unknown}, but the LM's embedding table has "
                f"{self.num_embeddings} rows; call lm.resize_token_embeddings({needed}) first, or "
                "use the LM's own tokenizer"
            )

    def _spaced(self, text: str) -> str:
        return text if self._adds_space or not text else f" {text}"

    @property
    def least_tokens(self) -> int:
        """Tokens that the LM reads of the shortest prompt: an empty document, no clue and a query of one token."""
        return len(self._head) + len(self._tail) + self.suffix.least_tokens

    def documents(self, documents: Sequence[Document]) -> list[DocumentPrefix]:
        """Make the prefixes of documents; only a document's own text is ever truncated, at its end."""
        prefixes = []
        texts = [document_text(document) for document in documents]
        for text, ids in zip(texts, self._text_tokenizer([self._spaced(text) for text in texts]), strict=True):
            kept = ids[: self.max_document_tokens]
            self._expect_known(f"the document {short(text)}", kept)
            start = len(self._head)
            whole = (*self._head, *kept, *self._tail)
            prefixes.append(DocumentPrefix(whole, start, start + len(kept), len(ids) - len(kept)))
        return prefixes

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
        encoded = self._text_tokenizer([self._query_text(query) for query in queries])
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
        return [tuple(ids) for ids in encoded]

    def instructed(self, instruction: str) -> SuffixPieces | CluesFirstPieces:
        """Make the pieces of `suffix` with an instruction before the question; nothing of it is scored.

        Args:
            instruction: text; it is tokenised as the text of a query is.
        Raises: TypeError if it is not a string; ValueError if it is empty or too long, or where a prompt has no place
            for one.
        """
        if self.why_no_instruction:
            raise ValueError(f"instruction: {self.why_no_instruction}; leave instruction out")
        text = expect_text(instruction, "instruction").strip()
        if not text:
            raise ValueError(f"instruction must have at least one token, got {instruction!r}; None is no instruction")
        (words,) = self._text_tokenizer([self._spaced(text)])
        if len(words) > MAX_INSTRUCTION_TOKENS:
            raise ValueError(
                f"instruction {short(text)} must have at most {MAX_INSTRUCTION_TOKENS} tokens, got {len(words)}"
            )
        self._expect_known(f"the instruction {short(text)}", words)
        behind_clues, first, question = self._encode(["\nInstruction:", "Instruction:", "\nQuestion:"])
        if isinstance(self.suffix, CluesFirstPieces):
            return replace(self.suffix, question=(*first, *words, *question))
        return replace(
            self.suffix,
            question=(*behind_clues, *words, *question),
            bare_question=(*first, *words, *question),
        )

    def count(self, query: str) -> int:
        """Count the tokens of a query of any length, also of an empty one."""
        return len(self._text_tokenizer([self._query_text(query)])[0])

    def fits(self, query: str) -> bool:
        """Tell whether `queries` accepts a query of this length."""
        return 0 < self.count(query) <= self.max_query_tokens

    def _query_text(self, query: str) -> str:
        """Give the text that is tokenised: it follows a prompt, or begins what a decoder writes."""
        return query.strip() if self.encoder_decoder else self._spaced(query.strip())

    def offsets(self, document: Document) -> list[tuple[int, int]]:
        """Find the character spans of a document's tokens in `document_text`, in the order of ``document_ids``.

        Raises: ValueError for a tokenizer that cannot give offsets (a slow one).
        """
        text = document_text(document)
        spaced = self._spaced(text)
        shift = len(spaced) - len(text)
        offsets = self._text_tokenizer.offsets(spaced)[: self.max_document_tokens]
        return [(max(0, start - shift), max(0, end - shift)) for start, end in offsets]


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
            raise ValueError(f"{what} takes (query, document) pairs, but pair {place} has {len(pair)} items")
        query, document = pair
        expect_query(query, f"the query of pair {place}")
        document_text(document, f"the document of pair {place}")
        checked.append((query, document))
    return checked
