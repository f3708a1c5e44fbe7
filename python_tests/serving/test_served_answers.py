"""Adapters whose score is an answer behind the query, yes_no or graded, as the routes show them."""

from types import SimpleNamespace

import numpy as np
import pytest
from families.tiny import DOCUMENTS, QUERIES, tiny_lm, tiny_tokenizer

import qpeft_ext as qpeft
from qpeft_ext.serving.apis import COHERE_API, JINA_API, SCORE_API
from qpeft_ext.serving.ask import Ask
from qpeft_ext.serving.models import Served
from qpeft_ext.serving.prepare import prepare
from qpeft_ext.serving.ranked import rank
from qpeft_ext.serving.scoring_thread import score_pairs
from qpeft_ext.serving.settings import Limits

pytest.importorskip("fastapi", reason="the extra serve is not installed")

KINDS = {"yes_no": {"yes_words": ("y",), "no_words": ("n",)}, "graded": {"max_grade": 8}}
RELEVANCE = {"yes_no": lambda score: 1 / (1 + np.exp(-score)), "graded": lambda grade: 1 / (1 + np.exp(2 - grade / 2))}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    """A kind of score, and a reranker that has it."""
    config = qpeft.QPeftConfig(
        clues="top_k", k=2, rank=4, score=request.param, max_document_tokens=12, **KINDS[request.param]
    )
    model = qpeft.get_qpeft_model(tiny_lm("llama"), config, tiny_tokenizer())
    return request.param, qpeft.Reranker(model, deterministic=True)


def answer(reranker, api, **options):
    ask = Ask("query", "documents", [QUERIES[0]], list(DOCUMENTS), **options)
    prepared = prepare(ask, SimpleNamespace(get=lambda name: Served("tiny", reranker)), None, Limits())
    score_pairs({prepared.job: list(range(len(prepared.job.pairs)))}, lambda: None)
    return api.respond(rank(prepared)), prepared


@pytest.mark.parametrize("api", [COHERE_API, JINA_API])
def test_relevances_are_those_of_the_answer_and_no_query_is_read_alone(kind, api):
    name, reranker = kind
    body, prepared = answer(reranker, api)
    rows = reranker.rank(QUERIES[0], DOCUMENTS)
    assert [r["index"] for r in body["results"]] == [row["corpus_id"] for row in rows]
    expected = [RELEVANCE[name](np.float64(row["score"])) for row in rows]
    assert [r["relevance_score"] for r in body["results"]] == pytest.approx(expected, rel=1e-9)
    assert len(prepared.job.pairs) == len(DOCUMENTS)
    assert len(set(expected)) == len(expected)


def test_raw_scores_are_those_of_rank(kind):
    _, reranker = kind
    body, _ = answer(reranker, JINA_API, raw_scores=True)
    assert [(r["index"], r["relevance_score"]) for r in body["results"]] == [
        (row["corpus_id"], row["score"]) for row in reranker.rank(QUERIES[0], DOCUMENTS)
    ]
    scored, _ = answer(reranker, SCORE_API, raw_scores=True)
    assert [r["score"] for r in scored["data"]] == reranker.predict([(QUERIES[0], d) for d in DOCUMENTS]).tolist()


def test_a_threshold_and_warnings_of_what_is_cut(kind):
    name, reranker = kind
    body, prepared = answer(reranker, COHERE_API, max_tokens_per_document=2)
    cut = [i for i, d in enumerate(DOCUMENTS) if len(reranker.model.prompt.offsets(d)) > 2]
    assert body["meta"]["warnings"] == [f"documents[{i}] was cut to 2 tokens" for i in cut] and cut
    middle = sorted(r["relevance_score"] for r in answer(reranker, COHERE_API)[0]["results"])[1]
    above, _ = answer(reranker, COHERE_API, threshold=middle)
    assert len(above["results"]) == len(DOCUMENTS) - 1
