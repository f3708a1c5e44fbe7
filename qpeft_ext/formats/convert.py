"""Convert a collection to another format: everything that the target can store, and a count of what it cannot.

Targets: ``beir`` (folder), ``msmarco`` (folder), ``trec`` (folder with ``qrels.<split>.txt`` and ``run.<split>.trec``),
``upr`` (json), ``rankllm`` (jsonl), ``dpr`` (training json) and ``jsonl`` (training examples). Each appears under its
name when it is complete, or never. Parts that a target cannot store are counted, and may fail, before it is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from ..utils.files import AnyPath, new_folder
from ..utils.partial_file import ResultWriter
from . import trec
from .collection import Example
from .io import BYTE_ORDER_MARK
from .jsonl import training_examples, write_examples
from .source import Conversion, Source
from .trec import Qrels, Run, RunWriter

_TAB = re.compile(r"[\t\n\r]+")  # ends a column or a line


def convert(source: Source, output: AnyPath, target: str, *, num_negatives: int = 11, seed: int = 0) -> Conversion:
    """Write one split of a collection in another format.

    Args:
        source: the split.
        output: a new folder or a file, depending on the target; files may be .gz by their name.
        target: one of `TARGETS`.
        num_negatives: negatives of a training example, where examples are made from qrels and candidates.
        seed: seed of the drawing of those negatives.
    Raises: ValueError if the source lacks a part that the target is made of, or the folder exists already.
    """
    if target not in TARGETS:
        raise ValueError(f"convert: the target must be one of {', '.join(TARGETS)}, got {target!r}")
    done = Conversion()
    if target in OF_EXAMPLES:
        OF_EXAMPLES[target](source, output, done, num_negatives, seed)
    else:
        _OF_TEXTS[target](source, output, done)
    return done


def _write_beir(source: Source, output: AnyPath, done: Conversion) -> None:
    corpus, queries = source.need("beir", "corpus", "queries")
    done.lost["queries' answers"] = len(source.answers or ())
    done.lost["candidates"] = _size(source.run)
    with new_folder(output) as folder:
        done.written["documents"] = _lines(
            folder / "corpus.jsonl",
            (_json({"_id": i, "title": document["title"], "text": document["text"]}) for i, document in corpus.items()),
        )
        done.written["queries"] = _lines(
            folder / "queries.jsonl", (_json({"_id": query_id, "text": text}) for query_id, text in queries.items())
        )
        if (qrels := source.qrels) is not None:
            (folder / "qrels").mkdir()
            flat = _Flat(done)
            rows = (
                f"{flat.id_of_qrels(query_id)}\t{flat.id_of_qrels(doc_id)}\t{grade}"
                for query_id, judged in qrels.items()
                for doc_id, grade in judged.items()
            )
            done.written["judgements"] = (
                _lines(folder / "qrels" / f"{source.name}.tsv", chain(["query-id\tcorpus-id\tscore"], rows)) - 1
            )


def _write_msmarco(source: Source, output: AnyPath, done: Conversion) -> None:
    corpus, _ = source.need("msmarco", "corpus", "queries")
    queries = source.asked(done)
    done.lost["queries' answers"] = len(source.answers or ())
    flat = _Flat(done)
    with new_folder(output) as folder:

        def passages() -> Iterator[str]:
            for doc_id, document in corpus.items():
                done.lost["titles"] += bool(document["title"])
                yield f"{flat.id(doc_id)}\t{flat.text(document['text'])}"

        done.written["documents"] = _lines(folder / "collection.tsv", passages())
        done.written["queries"] = _lines(
            folder / f"queries.{source.name}.tsv",
            (f"{flat.id(query_id)}\t{flat.text(text)}" for query_id, text in queries.items()),
        )
        if (qrels := source.qrels) is not None:
            done.written["judgements"] = _write_qrels(folder / f"qrels.{source.name}.tsv", qrels)
        if source.run is not None:
            known = _known(source.run, queries, corpus, done)
            done.written["candidates"] = _lines(
                folder / f"top1000.{source.name}.tsv",
                (f"{q}\t{d}\t{flat.quiet(queries[q])}\t{flat.quiet(corpus[d]['text'])}" for q, d, _ in known),
            )
            done.lost["scores of candidates (their order is kept)"] = done.written["candidates"]


def _write_trec(source: Source, output: AnyPath, done: Conversion) -> None:
    if source.run is None and source.qrels is None:
        raise ValueError(
            f"trec is made of qrels or candidates, but {source.data.place} ({source.data.format}) holds "
            f"{', '.join(source.data.parts) or 'nothing'}; give a run"
        )
    done.lost["texts of documents"] = len(source.corpus or ())
    done.lost["texts of queries"] = len(source.queries or ())
    done.lost["queries' answers"] = len(source.answers or ())
    with new_folder(output) as folder:
        if (qrels := source.qrels) is not None:
            done.written["judgements"] = _write_qrels(folder / f"qrels.{source.name}.txt", qrels)
        if source.run is not None:
            with RunWriter(folder / f"run.{source.name}.trec") as writer:
                for query_id, ranking in source.run.items():
                    writer.add(query_id, ranking)
            done.written["candidates"] = writer.num_lines


def _write_upr(source: Source, output: AnyPath, done: Conversion) -> None:
    _, run = source.need("upr", "queries", "candidates")
    queries = source.asked(done)
    corpus, answers, qrels = source.corpus, source.answers or {}, source.qrels or {}
    labelled = 0

    def records() -> Iterator[tuple[str, dict]]:
        nonlocal labelled
        for query_id, ranking in _per_query(run, queries, done):
            passages = []
            for doc_id, score in ranking:
                passage: dict[str, Any] = {"id": doc_id, "score": score}
                if corpus is not None and doc_id in corpus:
                    passage |= {"title": corpus[doc_id]["title"], "text": corpus[doc_id]["text"]}
                elif corpus is not None:
                    done.lost["candidates that the corpus does not hold"] += 1
                    continue
                if doc_id in qrels.get(query_id, {}):
                    grade = qrels[query_id][doc_id]
                    passage["has_answer"] = grade > 0
                    labelled += 1
                    done.lost["grades other than 0 and 1"] += grade not in (0, 1)
                done.written["candidates"] += 1
                passages.append(passage)
            done.written["queries"] += 1
            yield query_id, {"question": queries[query_id], "answers": answers.get(query_id, []), "ctxs": passages}

    with ResultWriter(output) as file:  # by id, as Pyserini writes it: a list would lose the ids
        file.write(b"{\n")
        for number, (query_id, record) in enumerate(records()):
            file.write(f"{',' * (number > 0)}\n{_json(query_id)}: {_json(record)}".encode())
        file.write(b"\n}\n")
    done.lost["judgements of documents that are no candidates"] = _size(qrels) - labelled
    done.lost["documents that are no candidates"] = _not_candidates(corpus, run)


def _write_rankllm(source: Source, output: AnyPath, done: Conversion) -> None:
    _, corpus, run = source.need("rankllm", "queries", "corpus", "candidates")
    queries = source.asked(done)
    done.lost["judgements"] = _size(source.qrels)
    done.lost["queries' answers"] = len(source.answers or ())
    done.lost["documents that are no candidates"] = _not_candidates(corpus, run)

    def lines() -> Iterator[str]:
        for query_id, ranking in _per_query(run, queries, done):
            rows = []
            for doc_id, score in ranking:
                if doc_id not in corpus:
                    done.lost["candidates that the corpus does not hold"] += 1
                    continue
                document = {"title": corpus[doc_id]["title"], "text": corpus[doc_id]["text"]}
                rows.append({"docid": doc_id, "score": score, "doc": document})
            done.written["candidates"] += len(rows)
            yield _json({"query": {"text": queries[query_id], "qid": query_id}, "candidates": rows})

    done.written["queries"] = _lines(output, lines())


def _write_dpr(source: Source, output: AnyPath, done: Conversion, num_negatives: int, seed: int) -> None:
    with ResultWriter(output) as file:
        file.write(b"[")
        for number, example in enumerate(_examples(source, done, num_negatives, seed)):
            done.lost["query ids"] += "query_id" in example and example["query_id"] != str(number)
            record = {
                "question": example["query"],
                "answers": example.get("answers", []),
                "positive_ctxs": list(map(_passage, example["positives"])),
                "negative_ctxs": [],
                "hard_negative_ctxs": list(map(_passage, example["negatives"])),
            }
            file.write(f"{',' * (number > 0)}\n{_json(record)}".encode())
            done.written["training examples"] += 1
        file.write(b"\n]\n")


def _write_jsonl(source: Source, output: AnyPath, done: Conversion, num_negatives: int, seed: int) -> None:
    done.written["training examples"] = write_examples(output, _examples(source, done, num_negatives, seed))


_OF_TEXTS = {
    "beir": _write_beir,
    "msmarco": _write_msmarco,
    "trec": _write_trec,
    "upr": _write_upr,
    "rankllm": _write_rankllm,
}
OF_EXAMPLES = {"dpr": _write_dpr, "jsonl": _write_jsonl}
TARGETS = (*_OF_TEXTS, *OF_EXAMPLES)


def _examples(source: Source, done: Conversion, num_negatives: int, seed: int) -> Iterator[Example]:
    """Yield the examples of the source, or make them of qrels, candidates and texts by `training_examples`."""
    if source.data.has("examples", source.split):
        yield from source.data.examples(source.split)
        done.lost.update(source.data.left_out)
        return
    queries, qrels, corpus = source.need("a training example", "queries", "qrels", "corpus")
    examples, counts = training_examples(queries, qrels, source.run, corpus, num_negatives=num_negatives, seed=seed)
    done.lost.update(
        {
            "queries without a relevant document": counts.without_relevant,
            "queries without one in the corpus": counts.without_positives,
            "relevant documents that the corpus does not hold": counts.missing_positives,
        }
    )
    yield from examples


class _Flat:
    """Texts and ids for tab-separated files: a tab or a line end in a text becomes a space and is counted."""

    def __init__(self, done: Conversion) -> None:
        self.done = done

    def text(self, text: str) -> str:
        self.done.lost["texts with a tab or line end (a space now)"] += _TAB.search(text) is not None
        return self.quiet(text)

    def quiet(self, text: str) -> str:
        return _TAB.sub(" ", text)

    def id(self, value: str) -> str:
        if not value.strip() or _TAB.search(value) or value.startswith(BYTE_ORDER_MARK):
            raise ValueError(f"the id {value!r} cannot stand in a tab-separated file; rename it")
        return value

    def id_of_qrels(self, value: str) -> str:
        if value != value.strip(" \f\v"):  # which readers of qrels take for a part of the space between columns
            raise ValueError(f"the id {value!r} begins or ends with a blank, which qrels cannot hold; rename it")
        return self.id(value)


def _passage(document: str | Mapping[str, str]) -> dict[str, str]:
    if isinstance(document, str):
        return {"title": "", "text": document}
    identity = {"passage_id": str(document["id"])} if document.get("id") is not None else {}
    return {"title": document.get("title") or "", "text": document["text"], **identity}


def _per_query(run: Run, queries: Mapping[str, str], done: Conversion) -> Iterator[tuple[str, list]]:
    """Yield (query_id, ranking) of every query, also without candidates; count candidates of queries without text."""
    done.lost["candidates of queries without text"] = sum(len(run[q]) for q in run if q not in queries)
    for query_id in queries:
        yield query_id, run.get(query_id, [])


def _known(run: Run, queries, corpus, done: Conversion) -> Iterator[tuple[str, str, float]]:
    """Yield the candidates whose query and document have texts, and count the others."""
    for query_id, ranking in run.items():
        for doc_id, score in ranking:
            if query_id not in queries:
                done.lost["candidates of queries without text"] += 1
            elif doc_id not in corpus:
                done.lost["candidates that the corpus does not hold"] += 1
            else:
                yield query_id, doc_id, score


def _not_candidates(corpus: Mapping[str, dict] | None, run: Run) -> int:
    """Return how many documents are no candidates of any query."""
    if corpus is None:
        return 0
    candidates = {doc_id for ranking in run.values() for doc_id, _ in ranking}
    return len(corpus) - sum(doc_id in corpus for doc_id in candidates)


def _write_qrels(path: Path, qrels: Qrels) -> int:
    for query_id, judged in qrels.items():
        trec.check_id("query_id", query_id)
        for doc_id in judged:
            trec.check_id("doc_id", doc_id)
    return _lines(path, (f"{q} 0 {d} {grade}" for q, judged in qrels.items() for d, grade in judged.items()))


def _size(nested: Mapping | None) -> int:
    return sum(map(len, (nested or {}).values()))


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _lines(path: AnyPath, lines: Iterator[str]) -> int:
    """Write lines, completely or not at all. Returns: how many."""
    count = 0
    with ResultWriter(path) as file:
        for line in lines:
            file.write(f"{line}\n".encode())
            count += 1
    return count
