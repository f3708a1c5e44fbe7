"""A training set for documents that have no queries: an LM writes them, filters keep those that lead back.

    documents → prompts → generated queries (`QueryGenerator`), batch by batch on the disk (`PartialQueries`)
              → filters (`select`, `round_trip`) → training examples (`write_training_set`)

Only the first line needs the LM, so only its results are kept when the process is killed; the filters may be changed
before it is started again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple
from itertools import chain, islice
from typing import IO

from ..formats.collection import Example
from ..formats.jsonl import training_examples, write_examples
from ..prompts.prompt import document_text
from ..ranking.first_stage import BM25
from ..utils.files import write_text
from ..utils.partial_file import PartialFile
from ..utils.progress import progress_bar
from ..utils.words import counted
from .filters import Counts, Filters, KeptQuery, select
from .generator import GeneratedQuery, QueryGenerator

WINDOW = 4096  # documents that are tokenised and sorted by length together
_BLOCK = 256  # queries whose examples are made together

Batch = dict[str, list[GeneratedQuery]]  # doc_id -> its queries


class PartialQueries(PartialFile):
    """The queries that have been generated so far; each batch is a line of ``OUTPUT.part``.

    Args:
        num_documents: number of documents of the whole job.
        path, settings, about, resume: as for `PartialFile`.

    Attributes:
        batches: the batches that are complete.
        num_resumed: for how many documents an earlier process has generated queries.
    """

    def __init__(self, path, num_documents: int, settings: dict, *, about: dict | None = None, resume: bool = True):
        self.batches: list[Batch] = []
        self.num_documents = num_documents
        super().__init__(path, settings, about=about, resume=resume)
        self.num_resumed = self.num_done

    @property
    def num_done(self) -> int:
        """How many documents have their queries."""
        return sum(map(len, self.batches))

    def add(self, batch: Batch) -> None:
        """Append the queries of a batch of documents."""
        rows = {doc_id: list(map(astuple, queries)) for doc_id, queries in batch.items()}
        self.append(json.dumps(rows, ensure_ascii=False).encode("utf-8") + b"\n")
        self.batches.append(batch)

    def __str__(self) -> str:
        return f"{self.part} keeps the queries of {self.num_done} of {counted(self.num_documents, 'documents')}"

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
    """Return ``count`` documents (None: all) at random, in the order of the corpus; equal seeds choose equally."""
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
    """Generate queries for documents, batch by batch, except for batches that ``partial`` has already.

    Batches depend on the documents and the token budget only, so that a job that was killed and started again ends as
    one that was not. Documents without text get no query.

    Args:
        generator: writes the queries.
        corpus: doc_id -> document.
        doc_ids: the documents.
        partial: gets the queries.
        show_progress_bar: None shows it when the output is a terminal.

    Raises: ValueError if ``partial`` has other batches than these documents make.
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
    """Filter the generated queries and write training examples, in the order of the corpus.

    ``OUTPUT.json`` beside them gets ``about`` and the counts, and the partial file is removed.

    Args:
        partial: the queries that were generated.
        corpus: doc_id -> document.
        doc_ids: all documents, in order.
        filters: the options.
        seed: seed of the negatives.
        about: facts that are written into ``OUTPUT.json``.
        show_progress_bar: None shows it when the output is a terminal.

    Returns: how many queries were generated, dropped and kept.

    Raises: ValueError if no query is kept; the partial file stays, so that other filters can be tried.
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
            f"none of the {counted(counts.generated, 'generated queries')} was kept; loosen the filters:"
            f"{counts.reasons(', ')[1:]}"
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
    """Make training examples of the queries whose document BM25 finds, with negatives from BM25.

    Args:
        kept: the queries.
        corpus: doc_id -> document; all of it is searched.
        filters: the options.
        seed: seed of the negatives.
        counts: counts what is dropped.
        show_progress_bar: None shows it when the output is a terminal.

    Yields: {"query_id", "query", "positives", "negatives", "log_likelihood", "round_trip_rank"}; the last is the rank
        of the document for its query, from 1; None where BM25 was not asked, or does not find it.
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
