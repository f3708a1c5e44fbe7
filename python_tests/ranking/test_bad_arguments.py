"""Bad arguments of the API: an error of one line with the key facts."""

import numpy as np
import pytest
import torch

import qpeft_ext as qpeft
from qpeft_ext import formats


@pytest.fixture(scope="module")
def reranker(whole_job):
    return qpeft.Reranker.from_pretrained(whole_job / "adapter")


def similarity(change):
    """`similarity_topk` on good arguments with one changed."""

    def call(_):
        good = {
            "query_embeds": torch.randn(1, 3, 4),
            "query_mask": torch.ones(1, 3, dtype=torch.bool),
            "table": torch.randn(9, 4),
            "document_ids": torch.zeros(2, 5, dtype=torch.int64),
            "document_mask": torch.ones(2, 5, dtype=torch.bool),
            "query_index": torch.zeros(2, dtype=torch.int64),
            "k": 2,
        }
        return qpeft.ops.similarity_topk(**good | change)

    return call


API = {
    "a query that is no text": (lambda r: r.predict([(3, "d")]), TypeError, ["query of pair 0 must be a string"]),
    "a document that is no text": (lambda r: r.rank("q", [b"d"]), TypeError, ["document 0 must be a string or a dict"]),
    "a document without text": (lambda r: r.rank("q", [{"title": "t"}]), TypeError, ["a string 'text'"]),
    "an empty query": (lambda r: r.rank("", ["d"]), ValueError, ["at least one token, got ''"]),
    "a query too long": (lambda r: r.rank("x" * 65, ["d"]), ValueError, ["has 66 tokens, max_query_tokens is 64"]),
    "triples": (lambda r: r.predict([("q", "d", "e")]), ValueError, ["(query, document) pairs, but pair 0 has 3"]),
    "lists of unequal length": (lambda r: r.rank_many(["q"], []), ValueError, ["1 query but 0 lists"]),
    "top_k 0": (lambda r: r.rank("q", ["d"], top_k=0), ValueError, ["top_k must be at least 1, got 0"]),
    "a number as a cache": (lambda r: qpeft.Reranker(r.model, cache=9), TypeError, ["a DocumentCache, got int 9"]),
    "half a token": (lambda r: qpeft.Reranker(r.model, 1.5), TypeError, ["max_tokens_per_batch", "got 1.5"]),
    "deterministic as a word": (
        lambda r: qpeft.Reranker(r.model, deterministic="no"),
        TypeError,
        ["Reranker: deterministic must be True or False, got the string 'no'"],
    ),
    "truncate_queries as a word": (
        lambda r: qpeft.Reranker(r.model, truncate_queries="no"),
        TypeError,
        ["got the str"],
    ),
    "compile as a word": (
        lambda r: qpeft.Reranker(r.model, compile="no"),
        TypeError,
        ["compile must be True or False"],
    ),
    "return_documents as a word": (
        lambda r: r.rank("q", ["d"], return_documents="no"),
        TypeError,
        ["return_documents"],
    ),
    "convert_to_tensor as a number": (lambda r: r.predict([("q", "d")], convert_to_tensor=2), TypeError, ["got int 2"]),
    "deterministic scores as a word": (lambda r: r.model.score([("q", "d")], deterministic="no"), TypeError, ["'no'"]),
    "queries cut as a word": (lambda r: r.model.encode([("q", "d")], truncate_queries="no"), TypeError, ["'no'"]),
    "a trainer's deterministic as a word": (
        lambda r: qpeft.QPeftTrainer(
            qpeft.get_qpeft_model(r.model.lm, qpeft.QPeftConfig(), r.model.tokenizer), deterministic="no"
        ),
        TypeError,
        ["QPeftTrainer: deterministic"],
    ),
    "negative bytes": (lambda r: qpeft.Reranker(r.model, projected_bytes=-1), ValueError, ["projected_bytes", "-1"]),
    "unknown path": (
        lambda r: qpeft.Reranker(r.model, path="flat"),
        ValueError,
        ["document_first or plain, got 'flat'"],
    ),
    "relevance of a number": (lambda r: r.relevance(["q"], -1.0), TypeError, ["one score goes into a list: [score]"]),
    "relevance of a text": (lambda r: r.relevance("q", [-1.0]), TypeError, ["one query goes into a list: [query]"]),
    "relevance of nan": (lambda r: r.relevance(["q", "p"], [-1.0, float("nan")]), ValueError, ["score 1", "got nan"]),
    "k 0": (lambda _: qpeft.QPeftConfig(k=0), ValueError, ["k must be at least 1, got 0"]),
    "unknown filter": (lambda _: qpeft.QPeftConfig(filters=("stopwords",)), ValueError, ["did you mean 'stop_words'"]),
    "operator: wrong shape": (similarity({"table": torch.randn(9, 5)}), ValueError, ["similarity_topk", "[1, 3, 4]"]),
    "operator: wrong dtype": (similarity({"document_ids": torch.zeros(2, 5)}), TypeError, ["document_ids", "float32"]),
    "operator: k 0": (similarity({"k": 0}), ValueError, ["k", "0"]),
    "run: scores that rise": (lambda _: formats.trec.decreasing_scores([1.0, 2.0]), ValueError, ["rank 2"]),
}


@pytest.mark.parametrize("name", API)
def test_bad_arguments(name, reranker):
    call, kind, facts = API[name]
    with pytest.raises(kind) as caught:
        call(reranker)
    message = str(caught.value)
    assert "\n" not in message
    for fact in facts:
        assert fact in message


def test_what_is_no_error(reranker):
    """Empty documents, one token, no candidate at all, more candidates asked for than there are."""
    scores = reranker.predict([("tides", document) for document in ("", " ", "\n", "?", {"text": ""}, "tides")])
    assert torch.isfinite(torch.as_tensor(scores)).all()
    assert reranker.rank("tides", []) == []
    assert len(reranker.rank("tides", ["a", "b"], top_k=10)) == 2
    assert reranker.rank_many([], []) == []
    assert qpeft.Reranker(reranker.model, deterministic=np.True_).deterministic is True
