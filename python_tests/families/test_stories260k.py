"""A real checkpoint: stories260K (Llama, grouped-query attention, byte fallback), outside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import qpeft_ext as qpeft

SHARED = Path(os.environ.get("QPEFT_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data")).parent
CHECKPOINT = SHARED / "models" / "stories260K"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHECKPOINT.is_dir(), reason=f"the checkpoint {CHECKPOINT.name} is not there"),
]

DOCUMENTS = [
    {"title": "The red ball", "text": "Lily had a big red ball. She played with it in the park every day."},
    "Tom saw a small bird in the tree. The bird was sad because it could not fly.",
    "",
]
QUERIES = ["Who had a red ball?", "Why was the bird sad?"]
PAIRS = [(query, document) for query in QUERIES for document in DOCUMENTS]
# float32, one prompt a row, the model's own logits; recorded once, so that a change of template or score is seen
GOLDEN = [-20.8684, -27.936, -26.5704, -32.5351, -27.7799, -30.6649]


@pytest.fixture(scope="module")
def lm():
    return qpeft.load_lm(CHECKPOINT, dtype="float32")


@pytest.mark.parametrize("clues", ["attention", "top_k", "none"])
def test_document_first_equals_plain(lm, clues):
    model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues=clues, rank=8, k=5))
    first, plain = (model.score(PAIRS, path=path).mean_query_log_likelihood for path in ("document_first", "plain"))
    torch.testing.assert_close(first, plain, rtol=0, atol=1e-5)


def test_golden_scores(lm):
    model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="none"))
    assert model.score(PAIRS).query_log_likelihood.tolist() == pytest.approx(GOLDEN, abs=2e-3)


def test_the_right_document_wins(lm):
    reranker = qpeft.Reranker(qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="none")))
    assert [reranker.rank(query, DOCUMENTS)[0]["corpus_id"] for query in QUERIES] == [0, 1]


def test_an_adapter_comes_back_with_its_base_model(lm, tmp_path):
    model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="top_k", k=5, rank=8))
    with torch.no_grad():
        model.clues.mlp.down.weight.normal_(0, 0.05)
    model.save_pretrained(tmp_path / "adapter")
    loaded = qpeft.Reranker.from_pretrained(tmp_path / "adapter")
    assert (loaded.predict(PAIRS) == model.score(PAIRS).query_log_likelihood.numpy()).all()
