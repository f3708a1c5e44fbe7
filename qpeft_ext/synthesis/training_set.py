"""A training set for documents that have no queries: an LM writes them, filters keep those that lead back.

    documents → prompts → generated queries (`QueryGenerator`), batch by batch on the disk (`PartialQueries`)
              → filters (`select`, `round_trip`) → training examples (`write_training_set`)

Only the first line takes the LM, so only that is kept and gone on with after a kill; filters may be changed in between.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from itertools import chain, islice
from typing import IO

from ..formats.answers import answer_tokens, has_answer
from ..formats.collection import Example
from ..formats.jsonl import training_examples, write_examples
from ..prompts.prompt import document_text
from ..ranking.first_stage import BM25
from ..utils.files import write_text
from ..utils.partial_file import PartialFile
from ..utils.progress import progress_bar
from .generator import GeneratedQuery, QueryGenerator

WINDOW = 4096  # documents that are tokenised and sorted by length together
COPIED_WORDS = 4  # from so many words on, a query that stands in its document word for word is a copy
_BLOCK = 256  # queries whose examples are made together

Batch = dict[str, list[GeneratedQuery]]  # doc_id -> its queries


@dataclass(frozen=True)
class Filters:
    """Which generated queries are kept, and with which negatives.

    Args:
        min_tokens: a query with fewer is dropped.
        keep_unfinished: also queries that were cut because they had no end.
        min_log_likelihood: of the query given its document, the mean per token, nats.
        keep_fraction: only this share of the queries, those with the largest mean log-likelihood.
        round_trip_top: the document must be among so many best of BM25 for its query; 0: no such filter.
        num_negatives, depth: negatives per query, drawn from BM25's best ``depth`` other documents.
    Raises: ValueError for an impossible value.
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
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.keep_fraction <= 1:
            raise ValueError(f"keep_fraction must be above 0 and at most 1, got {self.keep_fraction}")
        if self.min_log_likelihood is not None and not self.min_log_likelihood <= 0:
            raise ValueError(f"min_log_likelihood is a log-probability, 0 at most, got {self.min_log_likelihood}")


@dataclass(frozen=True)
class KeptQuery:
    """A query that has passed the filters so far."""

    query_id: str
    doc_id: str
    text: str
    log_likelihood: float


@dataclass
class Counts:
    """What became of the generated queries.

    documents: that queries were generated for.  generated, kept: queries.  fewer_negatives: examples with fewer
    negatives than asked for.  dropped: why -> how many.
    """

    documents: int
    generated: int
    kept: int = 0
    fewer_negatives: int = 0
    dropped: Counter = field(default_factory=Counter)

    def reasons(self, between: str) -> str:
        """Why queries were dropped, the most frequent first."""
        return "".join(f"{between}{count} {why}" for why, count in self.dropped.most_common() if count)

    def __str__(self) -> str:
        text = (
            f"{self.kept} of {self.generated} queries for {self.documents} documents are kept; dropped:"
            f"{self.reasons(chr(10) + '  ') or ' none'}"
        )
        return text + (f"\n{self.fewer_negatives} have fewer negatives than asked for" if self.fewer_negatives else "")


class PartialQueries(PartialFile):
    """The generated queries so far; each batch is a line of ``OUTPUT.part``, and a kill costs at most one.

    Args:
        num_documents: of the whole job.
        path, settings, about, resume: of `PartialFile`.

    Attributes: batches: the complete ones.  num_resumed: documents that an earlier process has done.
    """

    def __init__(self, path, num_documents: int, settings: dict, *, about: dict | None = None, resume: bool = True):
        self.batches: list[Batch] = []
        self.num_documents = num_documents
        super().__init__(path, settings, about=about, resume=resume)
        self.num_resumed = self.num_done

    @property
    def num_done(self) -> int:
        """Documents with their queries."""
        return sum(map(len, self.batches))

    def add(self, batch: Batch) -> None:
        """Append the queries of a batch of documents."""
        rows = {doc_id: list(map(astuple, queries)) for doc_id, queries in batch.items()}
        self.append(json.dumps(rows, ensure_ascii=False).encode("utf-8") + b"\n")
        self.batches.append(batch)

    def __str__(self) -> str:
        return f"{self.part} keeps the queries of {self.num_done} of {self.num_documents} documents"

    def _take(self, piece: bytes) -> None:
        try:
            rows = json.loads(piece)
            batch = {doc_id: [GeneratedQuery(*query) for query in queries] for doc_id, queries in rows.items()}
        except (TypeError, AttributeError, RecursionError):
            raise ValueError("no batch of queries") from None
        if not piece.endswith(b"\n"):
            raise ValueError("torn")
        self.batches.append(batch)

    def _split(self, file: IO[bytes]) -> Iterator[bytes]:
        return iter(file)


def choose_documents(corpus: Mapping[str, dict], count: int | None, seed: int) -> list[str]:
    """``count`` documents at random, the same for the same seed, in the order of the corpus; None: all."""
    doc_ids = list(corpus)
    if count is None or count >= len(doc_ids):
        return doc_ids
    return [doc_ids[i] for i in sorted(random.Random(f"{seed} documents").sample(range(len(doc_ids)), count))]


def generate_queries(
    generator: QueryGenerator,
    corpus: Mapping[str, dict],
    doc_ids: Sequence[str],
    partial: PartialQueries,
    *,
    show_progress_bar: bool | None = None,
) -> None:
    """Write queries for the documents into ``partial``, batch by batch; what is there already is not done again.

    Batches depend on the documents and the token budget alone, so a job that was killed ends as one that was not.
    Documents without text get no query.

    Raises: ValueError if the part holds other batches than these documents make.
    """
    there = iter(list(partial.batches))
    with progress_bar(total=len(doc_ids), desc="queries", unit="document", show=show_progress_bar) as progress:
        for start in range(0, len(doc_ids), WINDOW):
            window = {i: corpus[i] for i in doc_ids[start : start + WINDOW]}
            written = [i for i, document in window.items() if document_text(document)]
            progress.update(len(window) - len(written))
            for places in generator.batches([window[i] for i in written]):
                batch = [written[place] for place in places]
                if (done := next(there, None)) is None:
                    queries = generator(batch, [window[i] for i in batch])
                    partial.add(dict(zip(batch, queries, strict=True)))
                elif list(done) != batch:
                    raise ValueError(
                        f"{partial.part} was changed: it holds other documents than this job has in their "
                        f"place; start over with --no-resume (resume=False)"
                    )
                progress.update(len(batch))


def select(
    generated: Mapping[str, Sequence[GeneratedQuery]],
    corpus: Mapping[str, dict],
    doc_ids: Sequence[str],
    filters: Filters,
    dropped: Counter,
) -> list[KeptQuery]:
    """The filters that look at a query, its document and its likelihood; what fails is counted in ``dropped``.

    In this order: without a word, undecodable, unfinished, too short, repetitive, longer than ``max_query_tokens``,
    copied from the document, below ``min_log_likelihood``, the same as another of the document, the same as one of
    another document (of those none is kept: no document is *the* answer to it), not among the likeliest.
    """
    said_of: dict[str, set[str]] = {}  # words of a query -> documents it was generated for
    kept = []
    for doc_id in doc_ids:
        if doc_id not in generated:
            dropped["documents have no text"] += 1
            continue
        for number, query in enumerate(generated[doc_id]):
            words = _words(query.text)
            same = " ".join(words)
            if why := _why_dropped(query, words, corpus[doc_id], filters):
                dropped[why] += 1
            elif doc_id in said_of.setdefault(same, set()):
                dropped["are the same as another of their document"] += 1
            else:
                said_of[same].add(doc_id)
                kept.append((same, KeptQuery(f"{doc_id}-{number}", doc_id, query.text, query.log_likelihood)))
    single = [query for same, query in kept if len(said_of[same]) == 1]
    dropped["were generated for several documents"] += len(kept) - len(single)
    wanted = math.ceil(filters.keep_fraction * len(single))
    likely = sorted(range(len(single)), key=lambda i: -single[i].log_likelihood)[:wanted]  # stable
    dropped["are not among the likeliest"] += len(single) - len(likely)
    return [single[i] for i in sorted(likely)]


def _words(text: str) -> list[str]:
    """Lower-cased, without punctuation."""
    return [token for token in answer_tokens(text) if any(map(str.isalnum, token))]


def _why_dropped(query: GeneratedQuery, words: list[str], document: dict, filters: Filters) -> str | None:
    if not words:
        return "have no word"
    if "\ufffd" in query.text:
        return "hold undecodable bytes"
    if not (query.ended or filters.keep_unfinished):
        return "have no end within max_new_tokens (keep_unfinished keeps them)"
    if query.num_tokens < filters.min_tokens:
        return f"have fewer than {filters.min_tokens} tokens"
    if 2 * len(set(words)) < len(words):
        return "repeat themselves (fewer than half of the words differ)"
    if query.log_likelihood is None:
        return "are longer than max_query_tokens"
    if len(words) >= COPIED_WORDS and has_answer(" ".join(_words(document_text(document))), [" ".join(words)]):
        return "are copied from their document"
    if filters.min_log_likelihood is not None and query.log_likelihood < filters.min_log_likelihood:
        return f"have a mean log-likelihood below {filters.min_log_likelihood:g}"
    return None


def write_training_set(
    partial: PartialQueries,
    corpus: Mapping[str, dict],
    doc_ids: Sequence[str],
    filters: Filters,
    seed: int,
    about: Mapping[str, object],
    *,
    show_progress_bar: bool | None = None,
) -> Counts:
    """Filter what was generated and write the training examples, as a whole or not at all, in the order of the corpus.

    Beside them goes ``OUTPUT.json`` with ``about`` and the counts; the part is removed.

    Raises: ValueError if no query is kept; the part stays, for other filters.
    """
    generated = {doc_id: queries for batch in partial.batches for doc_id, queries in batch.items()}
    counts = Counts(len(generated), sum(map(len, generated.values())))
    examples = round_trip(
        select(generated, corpus, doc_ids, filters, counts.dropped),
        corpus,
        filters,
        seed,
        counts,
        show_progress_bar=show_progress_bar,
    )
    if (first := next(examples, None)) is None:
        raise ValueError(
            f"none of the {counts.generated} generated queries was kept; loosen the filters:{counts.reasons(' ')}"
        )
    counts.kept = write_examples(partial.target, chain([first], examples))
    numbers = {"generated": counts.generated, "kept": counts.kept, "dropped": dict(+counts.dropped)}
    write_text(
        partial.target.with_name(f"{partial.target.name}.json"),
        json.dumps({**about, "queries": numbers}, indent=2) + "\n",
        follow=False,
    )
    partial.discard()
    return counts


def round_trip(
    kept: Sequence[KeptQuery],
    corpus: Mapping[str, dict],
    filters: Filters,
    seed: int,
    counts: Counts,
    *,
    show_progress_bar: bool | None = None,
) -> Iterator[Example]:
    """Examples of the queries whose document is among the best of BM25 over the whole corpus, with BM25's negatives.

    Yields: {"query_id", "query", "positives", "negatives", "log_likelihood", "round_trip_rank"}; the rank is that of
        the document for its query, from 1; None where BM25 was not asked, or does not find it.
    """
    asked = bool(filters.round_trip_top or filters.num_negatives)
    depth = max(filters.round_trip_top, filters.depth + 1)  # the document itself is no negative
    index = BM25(corpus, show_progress_bar=show_progress_bar) if asked and kept else None
    queries = iter(progress_bar(kept, desc="round trip", unit=" queries", delay=1, show=show_progress_bar))
    while block := list(islice(queries, _BLOCK)):
        passed: dict[str, KeptQuery] = {}
        run, ranks = {}, {}
        for query in block:
            ranking = index.search(query.text, depth) if index else []
            rank = next((rank for rank, (doc_id, _) in enumerate(ranking, 1) if doc_id == query.doc_id), None)
            if filters.round_trip_top and (rank is None or rank > filters.round_trip_top):
                counts.dropped[f"do not bring their document back among BM25's best {filters.round_trip_top}"] += 1
            else:
                passed[query.query_id], run[query.query_id], ranks[query.query_id] = query, ranking, rank
        if not passed:
            continue
        examples, made = training_examples(
            {query_id: query.text for query_id, query in passed.items()},
            {query_id: {query.doc_id: 1} for query_id, query in passed.items()},
            run if filters.num_negatives else None,
            corpus,
            num_negatives=filters.num_negatives,
            depth=filters.depth,
            seed=seed,
        )
        counts.fewer_negatives += made.fewer_negatives
        for example in examples:
            query_id = example["query_id"]
            yield example | {"log_likelihood": passed[query_id].log_likelihood, "round_trip_rank": ranks[query_id]}
