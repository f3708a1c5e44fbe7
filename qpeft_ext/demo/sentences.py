"""Queries from docstrings: their first sentences, without markup."""

from __future__ import annotations

import inspect
import re

LEAST_QUERY_WORDS, MOST_QUERY_WORDS = 5, 30
BOILERPLATE = re.compile(
    r"^(see |deprecated|alias |same as |todo|fixme|note|warning|usage|args?:|parameters?:|returns?:|examples?:|"
    r"internal|copied from|adapted from|base class|helper|test |overrid|inherit|"
    r"this (class|function|method) (is|was|has))",
    re.IGNORECASE,
)


def first_sentence(docstring: str) -> str | None:
    """Return the first sentence without markup; None if it is too short or too long, or says nothing."""
    return next(iter(sentences(docstring, 1)), None)


def sentences(docstring: str, most: int) -> list[str]:
    """Return up to ``most`` sentences from the start of a docstring, up to the first that is no usable query."""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", inspect.cleandoc(docstring)) if part.strip()]
    if paragraphs and re.match(r"^[\w.]+\(.*\)(\s*->.*)?$", paragraphs[0]):
        paragraphs = paragraphs[1:]  # numpy and torch put the signature first
    kept: list[str] = []
    for paragraph in paragraphs:
        text = _without_markup(paragraph)
        # "e.g. Foo" and "i.e. Foo" do not end a sentence
        for sentence in re.split(r"(?<!e\.g\.)(?<!i\.e\.)(?<=[.!?:])\s+(?=[A-Z])", text):
            sentence = sentence.strip().rstrip(".:;,! ")
            words = re.findall(r"[A-Za-z]{2,}", sentence)
            long_enough = LEAST_QUERY_WORDS <= len(words) and len(sentence.split()) <= MOST_QUERY_WORDS
            if not long_enough or len(sentence) > 8 * MOST_QUERY_WORDS or BOILERPLATE.match(sentence):
                return kept
            if re.search(r">>>|[{}<>|=\\]|https?:|---|\.\. ", sentence) or sum(map(len, words)) < 0.6 * len(sentence):
                return kept
            kept.append(sentence)
            if len(kept) == most:
                return kept
    return kept


def _without_markup(text: str) -> str:
    """Replace roles, links, literals and emphasis of reStructuredText and Markdown by their words."""
    role = r":[\w:+-]+:`[~!]?([^`<]*?)\s*(<[^`]*>)?`"
    text = re.sub(role, lambda match: match[1].rpartition(".")[2] or match[1], text)
    text = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`+([^`<]*?)\s*(<[^`]*>)?`+_*", r"\1", text)
    return re.sub(r"\*\*?(\w[^*]*)\*\*?", r"\1", text)
