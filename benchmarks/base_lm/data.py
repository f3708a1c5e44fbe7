"""Training text of the base LM: definitions of the demo's train packages, their docstrings, and pseudo-queries."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from passages import passage_texts
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qpeft_ext.config import QPeftConfig
from qpeft_ext.demo import definitions, harvest
from qpeft_ext.demo.sentences import sentences
from qpeft_ext.prompts.prompt import Prompt


@dataclass(frozen=True)
class Text:
    """A definition: a document (``title``, ``text``) and the sentences of its docstring (possibly none)."""

    title: str
    text: str
    sentences: list[str]


def training_texts() -> list[Text]:
    """Every definition of the train packages, documented or not, that no dev or test package contains."""
    counts: Counter[str] = Counter()
    held_out = harvest.DEV_PACKAGES + harvest.TEST_PACKAGES
    seen = {definition.digest for definition in definitions.iter_definitions(held_out, counts, documented=False)}
    texts = []
    for definition in definitions.iter_definitions(harvest.TRAIN_PACKAGES, counts, documented=False):
        if definition.digest not in seen:
            seen.add(definition.digest)
            texts.append(Text(definition.name, definition.source, sentences(definition.docstring, 4)))
    return texts


def train_tokenizer(texts: list[Text], vocabulary: int, seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over lower-cased words without white space.

    CamelCase and snake_case are split and spaces, underscores and line breaks are not coded, so that "shortest path",
    ``shortest_path`` and ``ShortestPath`` are the same ids: a small LM ranks by copying, and can only copy what is
    equal. Offsets into the text stay exact; decoding gives readable words, not the original spacing.
    """
    tokenizer = Tokenizer(models.BPE())
    humps = Regex(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(humps, " "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\s_]+"), "removed"),
            pre_tokenizers.Split(Regex(r"[a-z]+|[0-9]{1,3}|[^a-z0-9]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),  # any byte has an id
        ]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<bos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sample = random.Random(seed).sample(range(len(texts)), min(len(texts), 60_000))
    # Docstrings count more than their share: queries are written in their words.
    lines = (line for row in sample for line in (texts[row].title, texts[row].text[:1000], *texts[row].sentences * 4))
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>")


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths in one array: row i is ``ids[starts[i] : starts[i + 1]]``."""

    ids: np.ndarray
    starts: np.ndarray

    def __getitem__(self, row: int) -> np.ndarray:
        return self.ids[self.starts[row] : self.starts[row + 1]].astype(np.int64)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @classmethod
    def of(cls, rows: list) -> Ragged:
        return cls(np.concatenate([np.asarray(row, np.uint16) for row in rows]), np.cumsum([0, *map(len, rows)]))


@dataclass
class TokenisedTexts:
    """What training reads.

    documents: token ids of title and text.  sentences: docstring sentences, first one first.
    first_sentence: [documents + 1]; the sentences of document i are rows first_sentence[i] : first_sentence[i + 1].
    is_word: [V], whether a token is made of letters.  frequency: [V], tokens counted over the documents.
    first_passage: documents from this one on are passages, not definitions.
    """

    tokenizer: PreTrainedTokenizerFast
    prompt: Prompt
    documents: Ragged
    sentences: Ragged
    first_sentence: np.ndarray
    is_word: np.ndarray
    frequency: np.ndarray
    first_passage: int


def prepare(folder: Path, vocabulary: int, max_document_tokens: int, max_query_tokens: int, seed: int,
            passages: Path | None = None):  # fmt: skip
    """`TokenisedTexts`, built once and kept in ``folder``; ``passages``: see `passages.passage_texts`."""
    done = folder / "texts.npz"
    if not done.exists():
        _build(folder, vocabulary, max_document_tokens, max_query_tokens, seed, passages)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    arrays = np.load(done)  # plain arrays: pickled ones are refused by default
    documents = Ragged(arrays["document_ids"], arrays["document_starts"])
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return TokenisedTexts(
        tokenizer,
        Prompt(tokenizer, QPeftConfig(max_document_tokens=max_document_tokens, max_query_tokens=max_query_tokens)),
        documents,
        Ragged(arrays["sentence_ids"], arrays["sentence_starts"]),
        arrays["first_sentence"],
        np.array([piece.isascii() and piece.isalpha() for piece in pieces]),
        np.bincount(documents.ids, minlength=len(tokenizer)),
        int(arrays["first_passage"]) if "first_passage" in arrays else len(documents),
    )


def _build(folder: Path, vocabulary: int, max_document_tokens: int, max_query_tokens: int, seed: int,
           passages: Path | None) -> None:  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    texts = training_texts()
    first_passage = len(texts)
    if passages is not None:
        texts += [Text(*passage) for passage in passage_texts(passages)]
    tokenizer = train_tokenizer(texts, vocabulary, seed)
    tokenizer.save_pretrained(folder)
    prompt = Prompt(tokenizer, QPeftConfig(max_document_tokens=max_document_tokens, max_query_tokens=max_query_tokens))
    prefixes = prompt.documents([{"title": text.title, "text": text.text} for text in texts])
    sentences, first_sentence = [], [0]
    for text in texts:
        encoded = tokenizer(text.sentences, add_special_tokens=False)["input_ids"] if text.sentences else []
        sentences += [ids for ids in encoded if 3 <= len(ids) <= max_query_tokens]
        first_sentence.append(len(sentences))
    documents, sentences = Ragged.of([prefix.document_ids for prefix in prefixes]), Ragged.of(sentences)
    unfinished = folder / "unfinished.npz"
    np.savez(
        unfinished,
        document_ids=documents.ids,
        document_starts=documents.starts,
        sentence_ids=sentences.ids,
        sentence_starts=sentences.starts,
        first_sentence=np.array(first_sentence),
        first_passage=np.array(first_passage),
    )
    unfinished.rename(folder / "texts.npz")


def pseudo_query(document: np.ndarray, texts: TokenisedTexts, rng: np.random.Generator) -> np.ndarray:
    """A query made of a document: a window of it, mostly its words, thinned, and half of the time shuffled."""
    width = int(rng.integers(6, 48))
    start = int(rng.integers(0, max(1, len(document) - width + 1)))
    window = document[start : start + width]
    if rng.random() < 0.8:
        words = window[texts.is_word[window]]
        window = words if len(words) >= 3 else window
    window = window[rng.random(len(window)) < rng.uniform(0.3, 1.0)][: int(rng.integers(3, 16))]
    if len(window) == 0:
        window = document[:3]
    return rng.permutation(window) if rng.random() < 0.5 else window


def hints(document: np.ndarray, query: np.ndarray, texts: TokenisedTexts, rng: np.random.Generator) -> np.ndarray:
    """1 to 16 distinct document tokens: those of the query (rare ones first) mixed with random ones, shuffled.

    The share of query tokens varies, so that the hints line is worth reading but not to be trusted blindly.
    """
    wanted = int(rng.integers(1, 17))
    shared = np.intersect1d(document, query)
    shared = shared[np.argsort(texts.frequency[shared], kind="stable")][: round(wanted * rng.random())]
    others = np.setdiff1d(document, shared)
    others = rng.permutation(others)[: wanted - len(shared)]
    return rng.permutation(np.concatenate([shared, others]))


def prompt_rows(
    document: np.ndarray, queries: list[tuple[np.ndarray, np.ndarray | None]], prompt: Prompt
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One document prefix followed by the suffixes of several queries, which share it.

    Args:
        document: ids of title and text.
        queries: (query ids, hint ids or None) each.
    Returns: ids, segments (0 the prefix, i the i-th suffix), positions (each suffix continues the prefix), and
        is_query (whether the token belongs to a query, so that it is scored), each [S].
    """
    prefix = np.concatenate([prompt._head, document, prompt._tail]).astype(np.int64)
    rows, segments, positions = [prefix], [np.zeros(len(prefix), np.int64)], [np.arange(len(prefix))]
    is_query = [np.zeros(len(prefix), bool)]
    for number, (query, clues) in enumerate(queries, 1):
        pieces = prompt.suffix
        header = pieces.bare_question if clues is None else (*pieces.hints, *clues, *pieces.question)
        suffix = np.concatenate([header, query]).astype(np.int64)
        rows.append(suffix)
        segments.append(np.full(len(suffix), number))
        positions.append(len(prefix) + np.arange(len(suffix)))
        is_query.append(np.arange(len(suffix)) >= len(header))
    return tuple(np.concatenate(parts) for parts in (rows, segments, positions, is_query))
