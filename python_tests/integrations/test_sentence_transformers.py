"""Keywords that the evaluators of sentence-transformers pass, and those evaluators themselves."""

import numpy as np
import pytest
import torch
from stub_server import DOCUMENTS, QUERY

from qpeft_ext.integrations.sentence_transformers import QPeftCrossEncoder


@pytest.mark.parametrize("kind", ["reranker", "plug-in"])
def test_keywords_of_predict(reranker, kind):
    model = reranker if kind == "reranker" else QPeftCrossEncoder(reranker)
    pairs = [[QUERY, text] for text in DOCUMENTS]
    options = {"prompt_name": None, "batch_size": 2, "show_progress_bar": False}
    scores = model.predict(pairs, convert_to_numpy=True, **options)
    assert isinstance(scores, np.ndarray) and scores.shape == (4,)
    tensor = model.predict(pairs, convert_to_tensor=True, **options)
    assert isinstance(tensor, torch.Tensor) and tensor.tolist() == scores.tolist()
    assert [row["corpus_id"] for row in model.rank(QUERY, DOCUMENTS)] == np.argsort(-scores, kind="stable").tolist()


@pytest.mark.parametrize("options", [{}, {"convert_to_numpy": False}, {"convert_to_tensor": True}])
def test_one_pair_gives_one_of_what_pairs_give(reranker, options):
    one, many = reranker.predict([QUERY, DOCUMENTS[0]], **options), reranker.predict([[QUERY, DOCUMENTS[0]]], **options)
    assert isinstance(one, torch.Tensor if options else float) and one == many[0]
    assert not options or one.shape == ()


def test_a_prompt_by_name_is_refused(reranker):
    with pytest.raises(ValueError, match="^predict: the adapter has no prompts by name"):
        reranker.predict([(QUERY, DOCUMENTS[0])], prompt_name="query")


def test_an_url_is_refused():
    with pytest.raises(ValueError, match="expected a Reranker or an adapter, got the URL http://127.0.0.1:1"):
        QPeftCrossEncoder("http://127.0.0.1:1")


def test_the_reranking_evaluator(reranker):
    evaluation = pytest.importorskip(
        "sentence_transformers.cross_encoder.evaluation",
        reason="sentence-transformers is not installed; see `make test-plugins`",
    )
    samples = [
        {"query": QUERY, "positive": [DOCUMENTS[1]], "negative": [DOCUMENTS[0], *DOCUMENTS[2:]]},
        {"query": "moon", "positive": [DOCUMENTS[2]], "documents": DOCUMENTS},
    ]
    model = QPeftCrossEncoder(reranker)
    figures = evaluation.CrossEncoderRerankingEvaluator([samples[0]], at_k=10, name="tiny", write_csv=False)(model)
    rank = [row["corpus_id"] for row in reranker.rank(QUERY, DOCUMENTS)].index(1) + 1
    assert figures["tiny_mrr@10"] == pytest.approx(1 / rank) == figures["tiny_map"]
    assert figures["tiny_ndcg@10"] == pytest.approx(1 / np.log2(rank + 1))
    assert model.model_card_data.metrics["tiny"] == figures
    figures = evaluation.CrossEncoderRerankingEvaluator([samples[1]], at_k=10, write_csv=False)(model)
    assert figures["base_mrr@10"] == pytest.approx(1 / 3)


def test_the_correlation_evaluator(reranker):
    evaluation = pytest.importorskip(
        "sentence_transformers.cross_encoder.evaluation",
        reason="sentence-transformers is not installed; see `make test-plugins`",
    )
    pairs = [[QUERY, text] for text in DOCUMENTS]
    scores = reranker.predict(pairs)
    evaluator = evaluation.CrossEncoderCorrelationEvaluator(pairs, (2 * scores + 1).tolist(), write_csv=False)
    assert evaluator(QPeftCrossEncoder(reranker))["pearson"] == pytest.approx(1)
