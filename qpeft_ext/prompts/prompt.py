"""The prompt: a document prefix that never sees the query, and a query suffix.

    <bos> {instruction} Passage: {title} {text}\\n  |  hints: <clue vectors>\\nQuestion: {query}

With `num_virtual_tokens` a trained soft prompt stands in the place of the instruction. With ``template="upr"``:

    <bos> Passage: {title} {text}  |  hints: <clue vectors>. Please write a question based on this passage. {query}

With ``layout="clues_first"`` the clues stand before the document, and nothing can be shared:

    <bos> {instruction} hints: <clue vectors>\\n Passage: {title} {text}\\nQuestion: {query}

The encoder of an encoder–decoder LM reads all but the query, between the special tokens that the tokenizer puts around
a text (T5: ``</s>`` at the end); the query is its decoder's.

The pieces are tokenised separately, so the ids of a prefix depend on its document alone, and every span is known
as a number: nothing is ever searched by token id.

Documents and queries are text: the words of a special token in them (``</s>``, ``<|im_start|>``) are tokenised as any
other words, unless ``allow_special_tokens``. In an instruction they are special tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import QPeftConfig
from ..utils.inputs import as_list, expect_text, kind_of, short
from ..utils.text_tokens import TextTokenizer

Document = str | dict
UPR_INSTRUCTION = ". Please write a question based on this passage."  # Sachan et al. 2022, arXiv 2204.07496


@dataclass(frozen=True)
class DocumentPrefix:
    """Token ids of one document prefix; with ``layout="clues_first"`` of the piece that stands after the clues.

    ids: the whole prefix, with 0 for each token of a soft prompt.  start, end: the span that clues come from, title
    and text.  cut: tokens lost to truncation.
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
    """Tokens that are scored with the query, before and after it; of an encoder–decoder LM also what its decoder reads
    before them (``given``)."""

    given: tuple[int, ...] = ()
    scored_before: tuple[int, ...] = ()
    scored_after: tuple[int, ...] = ()

    def scored(self, query: tuple[int, ...]) -> tuple[int, ...]:
        """The tokens whose likelihood is the score."""
        return (*self.scored_before, *query, *self.scored_after)


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
        """A prompt up to its query.

        Returns: the ids, 0 in each of the ``clues`` slots; where the slots begin; where what follows the document does.
        """
        if not clues:
            return document + self.bare_question, len(document), len(document)
        ids = (*document, *self.hints, *(0,) * clues, *self.question)
        return ids, len(document) + len(self.hints), len(document)


@dataclass(frozen=True)
class CluesFirstPieces(_AroundTheQuery):
    """Those of ``layout="clues_first"``: ``head`` + ``hints`` + clues + ``newline`` + document + ``question``.

    Without a clue there are neither ``hints`` nor ``newline``. `lay_out` is as in `SuffixPieces`.
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


class Prompt:
    """Turns documents and queries into token ids.

    Args:
        tokenizer: a transformers tokenizer; a pad token is not needed.
        config: `QPeftConfig` (template, layout, instruction, num_virtual_tokens, allow_special_tokens, the two length
            limits, and whether there are clues).
        encoder_decoder: whether the LM is one.

    Attributes:
        num_embeddings: rows of the LM's embedding table, which no token id may reach; None: not known (`expect_rows`).
        soft_prompt_start: where in every prefix the soft prompt stands, if there is one.
        instruction_ids: the tokens that it replaces; () without one.
    """

    def __init__(self, tokenizer, config: QPeftConfig, encoder_decoder: bool = False) -> None:
        self.tokenizer = tokenizer
        self.encoder_decoder = encoder_decoder
        self.max_document_tokens = config.max_document_tokens
        self.max_query_tokens = config.max_query_tokens
        self.allow_special_tokens = config.allow_special_tokens
        self._text_tokenizer = TextTokenizer(tokenizer, config.allow_special_tokens)
        self._template_tokenizer = TextTokenizer(tokenizer, special_tokens=True)
        self.num_embeddings: int | None = None
        # SentencePiece tokenizers put a space before each piece by themselves; byte-level ones need it in the text.
        first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"][:1])
        self._adds_space = bool(first) and first[0].startswith("▁")
        if encoder_decoder:
            bos, eos = self._around()
        else:
            bos, eos = (() if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)), ()
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
            if config.clues == "none":  # then all that the encoder reads is the document's
                tail, bare = tail + bare, ()
            upr = config.template == "upr"
            around = {"scored_before": bos, "scored_after": eos} if upr else {"given": bos}
        self.suffix = SuffixPieces(hints, question, bare, **around)
        self._head, self._tail = bos + head, tail

    def _pieces(self, config: QPeftConfig) -> tuple[tuple[int, ...], ...]:
        """Before the text, after it, before the clues, after them, and in their place if there is none."""
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
        """Token ids of a text that goes on where a word ends."""
        word, both = self._encode(["a", f"a{text}"])
        return both[len(word) :] if both[: len(word)] == word else self._encode([text])[0]

    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The special tokens that the tokenizer puts before and after a text."""
        text, whole = self._encode(["a"])[0], self.tokenizer("a")["input_ids"]
        for start in range(len(whole) - len(text) + 1):
            if whole[start : start + len(text)] == text:
                return tuple(whole[:start]), tuple(whole[start + len(text) :])
        return (), ()

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of pieces of the template."""
        return self._template_tokenizer(texts)

    def expect_rows(self, num_embeddings: int) -> None:
        """From now on token ids must be rows of an embedding table of this length.

        Raises: ValueError if one of the template is none; `documents` and `queries` raise it for texts.
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
        """Tokens that the LM reads of a prompt with an empty document, no clue and a query of one token."""
        return len(self._head) + len(self._tail) + self.suffix.least_tokens

    def documents(self, documents: Sequence[Document]) -> list[DocumentPrefix]:
        """Prefixes of the documents; only a document's own text is ever truncated, at its end."""
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
        """Token ids of the queries.

        Args:
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

    def count(self, query: str) -> int:
        """Tokens of a query of any length, also of none."""
        return len(self._text_tokenizer([self._query_text(query)])[0])

    def fits(self, query: str) -> bool:
        """Whether `queries` takes it."""
        return 0 < self.count(query) <= self.max_query_tokens

    def _query_text(self, query: str) -> str:
        """As it is tokenised: behind a prompt, or at the beginning of what a decoder writes."""
        return query.strip() if self.encoder_decoder else self._spaced(query.strip())

    def offsets(self, document: Document) -> list[tuple[int, int]]:
        """Character spans of the document tokens in `document_text`, in the order of ``document_ids``.

        Raises: ValueError for a tokenizer that cannot give offsets (a slow one).
        """
        text = document_text(document)
        spaced = self._spaced(text)
        shift = len(spaced) - len(text)
        offsets = self._text_tokenizer.offsets(spaced)[: self.max_document_tokens]
        return [(max(0, start - shift), max(0, end - shift)) for start, end in offsets]


def document_text(document: Document, place: str = "a document") -> str:
    """Title and text of a document as one string, title first.

    Args:
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
    """The query itself. Raises: as `expect_text`; ValueError if it is empty."""
    if not expect_text(query, place).strip():
        raise ValueError(f"{place} must have at least one token, got {short(query)}")
    return query


def as_documents(documents: Iterable[Document], what: str, of: str = "") -> list[Document]:
    """What was given as the documents of a query, read once, each of them checked.

    Args:
        what: "rank: documents"; errors about the list begin with it.  of: " of query 3", behind "document 5".
    Raises: as `as_list` and `document_text`.
    """
    checked = as_list(documents, what, "one document goes into a list: [document]")
    for place, document in enumerate(checked):
        document_text(document, f"document {place}{of}")
    return checked


def as_pairs(pairs: Iterable[Any], what: str) -> list[tuple[str, Document]]:
    """What was given as (query, document) pairs, read once, each of them checked.

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
