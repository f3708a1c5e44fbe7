"""Filters of generated queries: those that look at a query, its document and its likelihood."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..formats.answers import answer_tokens, has_answer
from ..prompts.prompt import document_text
from ..utils.inputs import whole_number
from ..utils.words import counted
from .generator import GeneratedQuery

COPIED_WORDS = 4  # a query of at least so many words that is in its document word for word is a copy


@dataclass(frozen=True)
class Filters:
    """Options of which generated queries are kept, and with which negatives.

    Args:
        min_tokens: queries with fewer tokens are dropped.
        keep_unfinished: keep queries that were cut because they did not end.
        min_log_likelihood: queries are dropped whose log-likelihood given their document, mean per token in nats, is
            smaller; None: no such filter.
        keep_fraction: share of the queries that is kept, rounded up, those with the largest mean log-likelihood.
        round_trip_top: the document must be among so many best documents of BM25 for its query; 0: no such filter.
        num_negatives: negatives of each query.
        depth: how many of BM25's best other documents the negatives are drawn from.

    Raises: ValueError for an impossible value; TypeError for a number that is not whole.
    """

    min_tokens: int = 3
    keep_unfinished: bool = False
    min_log_likelihood: float | None = None
    keep_fraction: float = 1.0
    round_trip_top: int = 20
    num_negatives: int = 11
    depth: int = 40

    def __post_init__(self) -> None:
        for name, least in (("min_tokens", 1), ("round_trip_top", 0), ("num_negatives", 0), ("depth", 1)):
            whole_number(getattr(self, name), name, least)
        if not 0 < self.keep_fraction <= 1:
            raise ValueError(f"keep_fraction must be above 0 and at most 1, got {self.keep_fraction}")
        if self.min_log_likelihood is not None and not self.min_log_likelihood <= 0:
            raise ValueError(f"min_log_likelihood is a log-probability, 0 at most, got {self.min_log_likelihood}")


@dataclass(frozen=True)
class KeptQuery:
    """A query that has passed the filters of `select`.

    Attributes:
        query_id: id of the document and a number.
        doc_id: the document that it was written for.
        text: the query.
        log_likelihood: as in `GeneratedQuery`.
    """

    query_id: str
    doc_id: str
    text: str
    log_likelihood: float


_NO_TEXT = "documents have no text"
_VERBS = {"have": "has", "hold": "holds", "repeat": "repeats", "are": "is", "were": "was", "do": "does"}


@dataclass
class Counts:
    """Numbers of the generated queries.

    Attributes:
        documents: how many documents queries were generated for.
        generated, kept: how many queries were generated, and how many are kept.
        fewer_negatives: how many examples have fewer negatives than asked for.
        dropped: reason -> how many queries were dropped for it.
    """

    documents: int
    generated: int
    kept: int = 0
    fewer_negatives: int = 0
    dropped: Counter = field(default_factory=Counter)

    def reasons(self, between: str) -> str:
        """List the reasons for which queries were dropped, the most frequent first, each after ``between``."""
        return "".join(
            f"{between}{count} {_of_one(why) if count == 1 else why}"
            for why, count in self.dropped.most_common()
            if count
        )

    def __str__(self) -> str:
        text = (
            f"{self.kept} of {counted(self.generated, 'queries')} for {counted(self.documents, 'documents')} "
            f"{'is' if self.kept == 1 else 'are'} kept; dropped:"
            f"{self.reasons(chr(10) + '  ') or ' none'}"
        )
        have = "has" if self.fewer_negatives == 1 else "have"
        fewer = f"\n{self.fewer_negatives} {have} fewer negatives than asked for"
        return text + (fewer if self.fewer_negatives else "")


def _of_one(why: str) -> str:
    """Return why several queries were dropped as it is said of one."""
    if why == _NO_TEXT:
        return "document has no text"
    verb, _, rest = why.partition(" ")
    return f"{_VERBS[verb]} {rest.replace('their ', 'its ').replace('themselves', 'itself')}"


def select(
    generated: Mapping[str, Sequence[GeneratedQuery]],
    corpus: Mapping[str, dict],
    doc_ids: Sequence[str],
    filters: Filters,
    dropped: Counter,
) -> list[KeptQuery]:
    """Apply the filters that look at a query, its document and its likelihood.

    The order is: no word, undecodable, unfinished, too short, repetitive, longer than ``max_query_tokens``, copied from
    the document, below ``min_log_likelihood``, the same as another query of the document, the same as a query of
    another document (none of them is kept, since neither document is *the* answer), not among the likeliest.

    Args:
        generated: doc_id -> its queries.
        corpus: doc_id -> document.
        doc_ids: all documents, in order.
        filters: the options.
        dropped: counts the reasons for which queries are dropped.

    Returns: the queries that are kept.
    """
    said_of: dict[str, set[str]] = {}  # words of a query -> documents it was generated for
    kept: list[tuple[str, KeptQuery]] = []
    for doc_id in doc_ids:
        if doc_id not in generated:
            dropped[_NO_TEXT] += 1
            continue
        for number, query in enumerate(generated[doc_id]):
            words = _words(query.text)
            same = " ".join(words)
            if why := _why_dropped(query, words, corpus[doc_id], filters):
                dropped[why] += 1
            elif doc_id in said_of.setdefault(same, set()):
                dropped["are the same as another of their document"] += 1
            else:
                assert query.log_likelihood is not None  # `_why_dropped` drops those
                said_of[same].add(doc_id)
                kept.append((same, KeptQuery(f"{doc_id}-{number}", doc_id, query.text, query.log_likelihood)))
    single = [query for same, query in kept if len(said_of[same]) == 1]
    dropped["were generated for several documents"] += len(kept) - len(single)
    wanted = math.ceil(round(filters.keep_fraction * len(single), 9))  # 0.07 · 100 is a little more than 7
    likely = sorted(range(len(single)), key=lambda i: -single[i].log_likelihood)[:wanted]  # stable
    dropped["are not among the likeliest"] += len(single) - len(likely)
    return [single[i] for i in sorted(likely)]


def _words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return [token for token in answer_tokens(text) if any(map(str.isalnum, token))]


def _why_dropped(query: GeneratedQuery, words: list[str], document: dict, filters: Filters) -> str | None:
    """Return the reason for which a query is dropped; None if it is not."""
    if not words:
        return "have no word"
    if "\ufffd" in query.text:
        return "hold undecodable bytes"
    if not (query.ended or filters.keep_unfinished):
        return "have no end within max_new_tokens (keep_unfinished keeps them)"
    if query.num_tokens < filters.min_tokens:
        return f"have fewer than {counted(filters.min_tokens, 'tokens')}"
    if 2 * len(set(words)) < len(words):
        return "repeat themselves (fewer than half of the words differ)"
    if query.log_likelihood is None:
        return "are longer than max_query_tokens"
    if len(words) >= COPIED_WORDS and has_answer(" ".join(_words(document_text(document))), [" ".join(words)]):
        return "are copied from their document"
    if filters.min_log_likelihood is not None and query.log_likelihood < filters.min_log_likelihood:
        return f"have a mean log-likelihood below {filters.min_log_likelihood:g}"
    return None
