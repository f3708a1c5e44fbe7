"""JSON lines: training examples, or documents.

Examples: {"query", "positives", "negatives"} (and "query_id", if there is one); a document in them is a text, or an
object with "text" and, if wanted, "id" and "title". Keys of other libraries are read too: `example_keys`. Documents:
an id, "text" or "contents", and perhaps "title".
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..utils.files import AnyPath
from ..utils.partial_file import ResultWriter
from ..utils.text import shorten
from ..utils.words import counted
from . import corpus
from .collection import Collection, Example, Glance
from .example_keys import ExampleKeys, are_of_examples
from .io import line_error, parse_object, read_lines, require_text
from .trec import Qrels, Run

_IDS = ("_id", "id", "docid", "doc_id")
_TEXTS = ("text", "contents")


class JsonlCorpus(corpus.FileCorpus):
    """Documents, one JSON object per line, under the names that BEIR, Pyserini and others give the keys."""

    format = "jsonl"
    expected = 'lines {"id", "title", "text"}'

    def parse(self, number: int, text: str) -> corpus.Document:
        record = parse_object(self.path, number, text.rstrip())
        return corpus.json_document(self.path, number, record, _first(record, _IDS), _first(record, _TEXTS))


class CorpusFile(Collection):
    """A file of documents: a corpus."""

    format = "jsonl"
    looks_for = 'jsonl with an id and "text" or "contents" (documents)'
    parts = ("corpus",)

    @classmethod
    def recognises(cls, glance: Glance) -> bool:
        return glance.has(*_IDS) and glance.has(*_TEXTS)

    @cached_property
    def corpus(self) -> Mapping[str, dict]:
        return JsonlCorpus(self.place)


class ExamplesFile(Collection):
    """A file of training examples."""

    format = "jsonl"
    looks_for = 'jsonl with "query" and "positives", or keys such as "pos" or "positive_passages" (training examples)'
    parts = ("examples",)

    @classmethod
    def recognises(cls, glance: Glance) -> bool:
        return glance.record is not None and are_of_examples(glance.record)

    def examples(self, split: str | None = None) -> Iterator[Example]:
        return iterate_examples(self.place)


def read_examples(path: AnyPath) -> list[Example]:
    """Read training examples from JSON lines; "negatives" may be missing.

    Args:
        path: The file, plain or .gz, under our keys or those of other libraries.

    Returns:
        The objects of the file under our keys, each with "negatives", which may be empty; further keys are kept.

    Raises:
        ValueError: For a bad example; the message names file and line.
    """
    return list(iterate_examples(path))


def iterate_examples(path: AnyPath) -> Iterator[Example]:
    """Yield the examples of `read_examples`, read one by one."""
    number, keys = 0, ExampleKeys(str(path))
    for number, text in read_lines(path, "training examples (jsonl)"):
        record = parse_object(path, number, text)
        try:
            example = dict(keys.own(record))
        except ValueError as error:
            raise line_error(path, number, str(error)) from None
        require_text(path, number, example, "query")
        for key in ("positives", "negatives"):
            _check_documents(path, number, example, key)
        if not example["positives"]:
            raise line_error(path, number, "'positives' is empty; expected at least one document")
        yield example
    if not number:
        raise ValueError(f'{path}: no training examples; expected lines {{"query", "positives", "negatives"}}')


def write_examples(path: AnyPath, examples: Iterable[Example]) -> int:
    """Write training examples as JSON lines, completely or not at all.

    Args:
        path: The file to write; .gz by its name.
        examples: The examples.

    Returns:
        How many were written.
    """
    count = 0
    with ResultWriter(path) as file:
        for example in examples:
            file.write((json.dumps(example, ensure_ascii=False) + "\n").encode("utf-8"))
            count += 1
    return count


@dataclass
class ExampleCounts:
    """Counts of what `training_examples` made of the queries of the qrels.

    Attributes:
        examples: queries that became an example.
        without_relevant: queries without a relevant document in the qrels, which are left out.
        without_candidates: queries that are not in the run, whose examples have no negatives.
        missing_positives: relevant documents that are not in the corpus.
        without_positives: queries left out because the corpus has none of their relevant documents.
        fewer_negatives: examples with fewer negatives than asked for, those without candidates included.
    """

    examples: int = 0
    without_relevant: int = 0
    without_candidates: int = 0
    missing_positives: int = 0
    without_positives: int = 0
    fewer_negatives: int = 0

    def __str__(self) -> str:
        notes = [
            (self.without_relevant, "queries without a relevant document left out", None),
            (
                self.without_positives,
                "queries left out because the corpus holds none of their relevant documents",
                "query left out because the corpus holds none of its relevant documents",
            ),
            (
                self.missing_positives,
                "relevant documents are not in the corpus",
                "relevant document is not in the corpus",
            ),
            (self.without_candidates, "queries are not in the run", "query is not in the run"),
            (
                self.fewer_negatives,
                "examples have fewer negatives than asked for",
                "example has fewer negatives than asked for",
            ),
        ]
        return "; ".join([counted(self.examples, "training examples"), *(counted(*note) for note in notes if note[0])])


def training_examples(
    queries: Mapping[str, str],
    qrels: Qrels,
    run: Run | None,
    corpus: Mapping[str, dict],
    *,
    num_negatives: int = 11,
    depth: int = 40,
    min_relevance: int = 1,
    seed: int = 0,
) -> tuple[list[Example], ExampleCounts]:
    """Make a training example of each query: its relevant documents, and negatives from the top of a run.

    The defaults suit the listwise loss: the positives and 11 negatives from the first stage's top 40.

    Args:
        queries: query_id → text.
        qrels: query_id → doc_id → relevance.
        run: Run of a first stage, from which the negatives are drawn without replacement; None for no negatives.
        corpus: doc_id → {"title"?, "text"}.
        num_negatives: Negatives per example, or as many as there are.
        depth: Number of the best candidates, without relevant ones, that the negatives are drawn from.
        min_relevance: Least judgement of a relevant document; documents below it and unjudged ones are negatives.
        seed: Seed of the drawing, which is independent for each query.

    Returns:
        Examples in the order of the qrels, each {"query_id", "query", "positives", "negatives"} with documents of the
        corpus, best first; and `ExampleCounts`.

    Raises:
        ValueError: If a query or a candidate is unknown, or if there is no example.
    """
    if num_negatives < 0 or depth < 1:
        raise ValueError(f"num_negatives must be at least 0 and depth at least 1, got {num_negatives} and {depth}")
    examples, counts = [], ExampleCounts()
    for query_id, judged in qrels.items():
        relevant = {doc_id: grade for doc_id, grade in judged.items() if grade >= min_relevance}
        if not relevant:
            counts.without_relevant += 1
            continue
        if query_id not in queries:
            raise ValueError(
                f"query {query_id!r} is in the qrels but not in the queries; the files do not belong together"
            )
        positives = [doc_id for doc_id in sorted(relevant, key=lambda d: -relevant[d]) if doc_id in corpus]
        counts.missing_positives += len(relevant) - len(positives)
        if not positives:
            counts.without_positives += 1
            continue
        candidates = [doc_id for doc_id, _ in (run or {}).get(query_id, []) if doc_id not in relevant][:depth]
        counts.without_candidates += run is not None and query_id not in run
        chosen = sorted(
            random.Random(f"{seed} {query_id}").sample(range(len(candidates)), min(num_negatives, len(candidates)))
        )
        counts.fewer_negatives += run is not None and len(chosen) < num_negatives
        negatives = [candidates[i] for i in chosen]
        for doc_id in negatives:
            if doc_id not in corpus:
                raise ValueError(
                    f"document {doc_id!r} of query {query_id!r} is in the run but not in the corpus; "
                    f"the run belongs to another corpus"
                )
        examples.append(
            {
                "query_id": query_id,
                "query": queries[query_id],
                "positives": [_document(corpus, doc_id) for doc_id in positives],
                "negatives": [_document(corpus, doc_id) for doc_id in negatives],
            }
        )
    counts.examples = len(examples)
    if not examples:
        raise ValueError(
            f"the qrels give no training example ({counts}); check that qrels, queries and corpus belong together"
        )
    return examples, counts


def _document(corpus: Mapping[str, dict], doc_id: str) -> dict[str, str]:
    document = corpus[doc_id]
    return {"id": doc_id, "title": document.get("title", ""), "text": document["text"]}


def _first(record: dict[str, Any], keys: tuple[str, ...]) -> str:
    return next((key for key in keys if key in record), keys[0])


def _check_documents(path: AnyPath, number: int, example: Example, key: str) -> None:
    documents = example.get(key)
    if not isinstance(documents, list):
        raise line_error(
            path,
            number,
            f"expected a list of documents under {key!r}, got "
            f"{shorten(documents) if key in example else 'no such key'}",
        )
    for document in documents:
        record = {"text": document} if isinstance(document, str) else document
        if not isinstance(record, dict):
            raise line_error(
                path, number, f"expected a text or an object with 'text' in {key!r}, got {shorten(document)}"
            )
        require_text(path, number, record, "text", empty=True)
        if record.get("title") is not None:
            require_text(path, number, record, "title", empty=True)
