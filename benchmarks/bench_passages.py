"""Long documents by their passages, against documents that are cut: nDCG@10, and what is read the second time.

    python benchmarks/bench_passages.py --data SQUAD     a BEIR folder; 8 consecutive paragraphs a document
    python benchmarks/bench_passages.py --code           8 functions of one class or module of the demo's test packages

Consecutive documents of one title become one document, with blank lines between them; a query's relevant documents are
those that hold its relevant parts. Every system reranks BM25's best by the likelihood of the query (UPR, no adapter).
Then one query is ranked against documents that were read (--again), and once more when each has grown by a sentence.
Fails if MaxP is worse than cut documents, or if a passage is read that was read before.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Mapping
from itertools import groupby

import result_file

import qpeft_ext as qpeft
from qpeft_ext import formats
from qpeft_ext.demo.harvest import demo_collection
from qpeft_ext.evaluation.measures import per_query
from qpeft_ext.evaluation.significance import paired_test
from qpeft_ext.formats.trec import Run
from qpeft_ext.lm.loading import BASE_LM
from qpeft_ext.ranking.first_stage import bm25_run

MEASURE = "nDCG@10"
SYSTEMS = ("cut", "first", "mean", "max")
NEW_SENTENCE = " This sentence was added later."
Documents = dict[str, dict]
Qrels = dict[str, dict[str, int]]


def joined(documents: Mapping[str, dict], qrels: Qrels, size: int) -> tuple[Documents, Qrels]:
    """Join ``size`` consecutive documents of one title to one, and make the qrels those of the joined ones."""
    long: Documents = {}
    place: dict[str, str] = {}
    for title, group in groupby(documents.items(), key=lambda item: item[1]["title"]):
        parts = list(group)
        for start in range(0, len(parts), size):
            doc_id = f"long{len(long)}"
            text = "\n\n".join(document["text"].strip() for _, document in parts[start : start + size])
            long[doc_id] = {"id": doc_id, "title": title, "text": text}
            place |= {part: doc_id for part, _ in parts[start : start + size]}
    return long, {query: {place[part]: grade for part, grade in judged.items()} for query, judged in qrels.items()}


def read_data(arguments) -> tuple[str, dict[str, str], Documents, Qrels]:
    """Return a name, a sample of the queries, joined documents and qrels."""
    if arguments.code:
        test = demo_collection(show_progress_bar=False).test
        name, queries, qrels = "code", test.queries, test.qrels
        modules = ((doc_id, document["title"].rpartition(".")[0]) for doc_id, document in test.documents.items())
        documents = {doc_id: {**test.documents[doc_id], "title": module} for doc_id, module in modules}
    else:
        data = formats.open_collection(arguments.data)
        corpus, qrels = data.corpus, data.qrels(arguments.split)
        name, queries, documents = "squad", data.queries(arguments.split), {i: corpus[i] for i in corpus}
    long, qrels = joined(documents, qrels, arguments.size)
    asked = random.Random(0).sample(sorted(qrels), min(arguments.queries, len(qrels)))
    return name, {query_id: queries[query_id] for query_id in asked}, long, {i: qrels[i] for i in asked}


class Ranking:
    """Ranks the candidates by one system, and again with the same cache."""

    def __init__(self, model: qpeft.QPeftModel, cache_bytes: int, **options) -> None:
        self.reranker = qpeft.Reranker(model, cache=qpeft.DocumentCache(cache_bytes), **options)

    def read(self, queries: dict[str, str], run: Run, documents: Documents) -> tuple[Run, int, float]:
        """Return the ranking, how many prefixes were computed for it, and seconds."""
        lists = [[documents[doc_id] for doc_id, _ in run[query_id]] for query_id in queries]
        before, start = self.reranker.cache.misses, time.perf_counter()
        rankings = self.reranker.rank_many(list(queries.values()), lists, show_progress_bar=None)
        seconds = time.perf_counter() - start
        ranked = {
            query_id: [(run[query_id][row["corpus_id"]][0], row["score"]) for row in rows]
            for query_id, rows in zip(queries, rankings, strict=True)
        }
        return ranked, self.reranker.cache.misses - before, seconds

    def texts(self, documents: list[dict]) -> set[tuple]:
        """Return the distinct prefixes of documents: of their passages, or of what is left when they are cut."""
        scoring, prompt = self.reranker.passages, self.reranker.model.prompt
        parts = documents if scoring is None else [p.document for each in scoring.split(documents) for p in each]
        return {prefix.ids for prefix in prompt.documents(parts)}


def measure(arguments, model: qpeft.QPeftModel) -> list[dict]:
    """Rank by every system; one row each."""
    name, queries, documents, qrels = read_data(arguments)
    run = bm25_run(documents, queries, arguments.candidates, show_progress_bar=False)
    used = {doc_id: documents[doc_id] for ranking in run.values() for doc_id, _ in ranking}
    again = dict(list(used.items())[: arguments.again])
    grown = {i: {**document, "text": document["text"] + NEW_SENTENCE} for i, document in again.items()}
    one = next(iter(queries))
    all_of_one = {one: queries[one]}, {one: [(doc_id, 0.0) for doc_id in again]}
    values = {"BM25": per_query(run, qrels, [MEASURE])[MEASURE]}
    rows = [_row(f"passages/{name}/BM25", arguments, values, "BM25")]
    for system in arguments.systems:
        options = {} if system == "cut" else {"passages": system, "passage_tokens": arguments.passage_tokens}
        ranking = Ranking(model, arguments.cache_bytes, **options)
        ranked, first, seconds = ranking.read(queries, run, used)
        cut = ranking.reranker.truncated
        _, second, _ = ranking.read(*all_of_one, again)
        _, third, _ = ranking.read(*all_of_one, grown)
        new = len(ranking.texts(list(grown.values())) - ranking.texts(list(again.values())))
        if second or third != new:
            raise SystemExit(f"{system}: {second} prefixes read again, {third} of grown documents, {new} are new")
        values[system] = per_query(ranked, qrels, [MEASURE])[MEASURE]
        rows.append(
            _row(f"passages/{name}/{system}", arguments, values, system)
            | {
                "documents": len(used),
                "documents_read_again": len(again),
                "documents_cut": cut,
                "prefixes_first": first,
                "prefixes_second": second,
                "prefixes_of_grown_documents": third,
                "seconds": round(seconds, 1),
            }
        )
        print({key: rows[-1][key] for key in ("work", MEASURE, "p", "prefixes_first", "seconds")}, flush=True)
    means = {system: sum(own.values()) / len(own) for system, own in values.items()}
    if {"cut", "max"} <= means.keys() and means["max"] < means["cut"]:
        raise SystemExit(f"MaxP has {MEASURE} {means['max']:.3f}, cut documents {means['cut']:.3f}")
    return rows


def _row(work: str, arguments, values: dict[str, dict[str, float]], system: str) -> dict:
    """Return the row of a system; p is of the paired t-test against cut documents, not corrected."""
    own, cut = values[system], values.get("cut")
    p = paired_test(own, cut) if cut and system not in ("cut", "BM25") else None
    lm = os.path.basename(os.path.normpath(arguments.lm))
    return {"work": work, "lm": lm, "queries": len(own), "candidates": arguments.candidates, "parts": arguments.size,
            "max_document_tokens": arguments.passage_tokens, MEASURE: sum(own.values()) / len(own), "p": p}  # fmt: skip


def main() -> None:
    parser = result_file.new_parser(__doc__, "passages")
    parser.add_argument("--data", help="BEIR folder of paragraphs, in the order in which they are joined")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--code", action="store_true", help="functions of installed packages instead of --data")
    parser.add_argument("--lm", default=str(BASE_LM), help="default: the packaged LM, which has read Python only")
    parser.add_argument("--systems", nargs="+", default=SYSTEMS, choices=SYSTEMS)
    parser.add_argument("--queries", type=int, default=60)
    parser.add_argument("--candidates", type=int, default=10)
    parser.add_argument("--again", type=int, default=20, help="documents that are read a second and a third time")
    parser.add_argument("--size", type=int, default=8, help="documents that are joined to one")
    parser.add_argument("--passage-tokens", type=int, default=160, help="also max_document_tokens of cut documents")
    parser.add_argument("--cache-bytes", type=int, default=16 << 30)
    arguments = result_file.parse(parser)
    if bool(arguments.data) == arguments.code:
        parser.error("give --data or --code")
    lm = qpeft.load_lm(arguments.lm, dtype="float32")
    config = qpeft.QPeftConfig(clues="none", max_document_tokens=arguments.passage_tokens)
    with tempfile.TemporaryDirectory() as folder:  # BM25's index of the joined documents
        os.environ["QPEFT_CACHE"] = folder
        rows = measure(arguments, qpeft.get_qpeft_model(lm, config))
    print("written to", result_file.save(arguments, "passages", rows))


if __name__ == "__main__":
    main()
