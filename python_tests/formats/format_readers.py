"""Every file format: how to read all of a file, and a small valid one; used by the tests of damaged files."""

from __future__ import annotations

import json

from qpeft_ext import formats
from qpeft_ext.formats import beir, dpr, jsonl, msmarco, open_collection, rankllm, trec, upr

TEXTS = {"2": {"id": "2", "title": "", "text": "the sea"}, "3": {"id": "3", "title": "", "text": "the moon"}}


def corpus_of(kind):
    def read(path):
        corpus = kind(path)
        return {doc_id: corpus[doc_id] for doc_id in corpus}

    return read


def everything(kind):
    """All parts of a collection, of all its splits."""

    def read(path):
        data = kind(path)
        return {
            (part, split): list(data.examples(split))
            if part == "examples"
            else dict(data.corpus)
            if part == "corpus"
            else getattr(data, part)(split)
            for split in data.splits or [None]
            for part in data.parts
            if data.has(part, split)
        }

    return read


READERS = {
    "beir corpus": corpus_of(beir.Corpus),
    "beir queries": beir.read_queries,
    "beir qrels": beir.read_qrels,
    "trec run": trec.read_run,
    "qrels": formats.read_qrels,
    "msmarco collection": corpus_of(msmarco.MsmarcoCorpus),
    "msmarco queries": msmarco.read_queries,
    "msmarco top1000": msmarco.read_top,
    "msmarco top1000 corpus": corpus_of(msmarco.TopCorpus),
    "msmarco triples": lambda path: list(msmarco.read_triples(path)),
    "msmarco triples of ids": lambda path: list(msmarco.read_id_triples(path, {"1": "q"}, TEXTS)),
    "dpr passages": corpus_of(dpr.Passages),
    "dpr questions": dpr.read_questions,
    "dpr training": everything(dpr.TrainingFile),
    "upr": everything(upr.RetrieverFile),
    "upr corpus": corpus_of(upr.Contexts),
    "rankllm": everything(rankllm.RequestsFile),
    "jsonl corpus": corpus_of(jsonl.JsonlCorpus),
    "jsonl examples": everything(jsonl.ExamplesFile),
    "any": everything(open_collection),
}


def lines(*values) -> bytes:
    return "".join(f"{value if isinstance(value, str) else json.dumps(value)}\n" for value in values).encode()


_PASSAGE = {"title": "Tides", "text": 'the "big" sea', "passage_id": "1"}
_TRAINING = [
    {
        "question": "why tides",
        "answers": ["sea"],
        "positive_ctxs": [_PASSAGE],
        "hard_negative_ctxs": [{"title": "Moon", "text": "round", "passage_id": "2", "score": 1.5}],
    },
    {"question": "who", "answers": [], "positive_ctxs": [], "negative_ctxs": [_PASSAGE]},
]
_RETRIEVED = [
    {
        "question": "why tides",
        "answers": ["the sea", "é"],
        "ctxs": [
            {"id": 2, "score": "1.5", "title": "T", "text": "the sea", "has_answer": True},
            {"id": "wiki:1", "score": 2, "title": "", "text": "moon", "has_answer": False},
        ],
    },
    {"question": "who", "answers": ["moon"], "ctxs": [{"id": "1", "score": 0.5, "title": "", "text": "moon"}]},
]
_REQUESTS = [
    {
        "query": {"text": "why", "qid": 1},
        "candidates": [
            {"docid": "d2", "score": 1.0, "doc": {"title": "Moon", "contents": "round"}},
            {"docid": 1, "score": 2, "doc": "sea"},
        ],
    },
    {"query": {"text": "who", "qid": "x"}, "candidates": [{"docid": 1, "score": 2, "doc": {"text": "sea"}}]},
]
_OLD_REQUESTS = [{"query": "why", "hits": [{"qid": "1", "docid": "d2", "rank": 1, "score": 0.5, "content": "round"}]}]
_EXAMPLES = [
    {"query_id": "q", "query": "é", "positives": ["a", {"id": "x", "title": "t", "text": ""}], "negatives": []},
    {"query": "b", "positives": [{"text": "p", "title": None}], "negatives": ["n"]},
]

# reader -> valid contents
VALID = {
    "beir corpus": [lines({"_id": "d1", "title": "T", "text": "the sea"}, {"_id": 2, "text": ""})],
    "beir queries": [lines({"_id": "q1", "text": "why é"}, {"_id": "q2", "text": "who"})],
    "beir qrels": [lines("query-id\tcorpus-id\tscore", "q1\td1\t2", "q1\td2\t0", "q2\td1\t1")],
    "trec run": [lines("q1 Q0 d1 1 2.5 t", "q1 Q0 d2 2 -1e-3 t", "q2\tQ0\td1\t1\t0\tt")],
    "qrels": [lines("q1 0 d1 2", "q2 0 d1 1"), lines("query-id\tcorpus-id\tscore", "q1\td1\t2"), lines(_RETRIEVED)],
    "msmarco collection": [lines("1\tthe sea", "2\t", '3\tmoon "light')],
    "msmarco queries": [lines("1\twhy tides", "2\twho é")],
    "msmarco top1000": [lines("1\t2\twhy\tthe sea", "1\t3\twhy\tmoon", "4\t2\twho\tthe sea")],
    "msmarco top1000 corpus": [lines("1\t2\twhy\tthe sea", "1\t3\twhy\tmoon", "4\t2\twho\tthe sea")],
    "msmarco triples": [lines("why\tsea\tmoon", "why\tsea\twind", "who\tme\tyou")],
    "msmarco triples of ids": [lines("1\t2\t3", "1\t3\t2")],
    "dpr passages": [lines("id\ttext\ttitle", '1\t"the ""big"" sea, 1984"\tTides', "2\tmoon\tMoon")],
    "dpr questions": [lines("what year\t['1984', \"'84\"]", 'quoted\t"[""a \'b\'""]"')],
    "dpr training": [lines(_TRAINING), json.dumps(_TRAINING, indent=1).encode(), lines(*_TRAINING)],
    "upr": [lines(_RETRIEVED), json.dumps(dict(zip("ab", _RETRIEVED, strict=True)), indent=1).encode()],
    "upr corpus": [lines(_RETRIEVED)],
    "rankllm": [lines(_REQUESTS), lines(*_REQUESTS), lines(_OLD_REQUESTS)],
    "jsonl corpus": [lines({"id": 1, "contents": "sea"}, {"docid": "b", "title": "T", "text": ""})],
    "jsonl examples": [lines(*_EXAMPLES)],
}
VALID["any"] = [
    content
    for name, contents in VALID.items()
    for content in contents
    if "qrels" not in name and "triples" not in name and name not in ("trec run", "beir queries")
]
