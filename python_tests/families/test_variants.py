"""Every variant of the clue module on four families: trains, equals the plain path, is saved and reranks, and what
its clues say without the LM.
"""

from __future__ import annotations

import pytest
import torch
from test_families import assert_same, scores_and_gradients
from tiny import DOCUMENTS, QUERIES, tiny_lm, tiny_tokenizer

import qpeft_ext as qpeft
from qpeft_ext.training.losses import pointwise_pairwise

pytestmark = pytest.mark.slow

VARIANTS = {
    "attention, no residual": {"clues": "attention", "residual": False},
    "top_k, no residual": {"residual": False},
    "attention, full matrices": {"clues": "attention", "rank": None},
    "attention, no biases, filtered": {"clues": "attention", "attention_bias": False, "filters": ("query_tokens",)},
    "generated LoRA": {"clues": "none", "generated_lora_rank": 4},
    "generated LoRA and attention": {"clues": "attention", "generated_lora_rank": 4},
    "soft prompt": {"clues": "none", "num_virtual_tokens": 6},
    "soft prompt with MLP and attention": {"clues": "attention", "num_virtual_tokens": 4, "soft_prompt_mlp": 8},
    "candidates": {"source": "candidates"},
    "vocabulary": {"source": "vocabulary", "filters": ("query_tokens",)},
    "vocabulary_per_token": {"source": "vocabulary_per_token", "k": 2},
    "random": {"selection": "random"},
    "low_rank": {"clue_embeddings": "low_rank"},
    "full": {"clue_embeddings": "full", "rank": None},
    "score_gate": {"score_gate": True},
    "score_gate of candidates": {"score_gate": True, "source": "candidates", "similarity": "dot"},
    "score_gate of the vocabulary": {"score_gate": True, "source": "vocabulary", "clue_embeddings": "low_rank"},
}
PAIRS = [(query, document) for query in QUERIES for document in DOCUMENTS]
POSITIVE = torch.tensor([[True, False, False, False], [False, False, False, True]])


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "t5"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_trains_is_saved_and_reranks(variant, family, tmp_path):
    options = {"clues": "top_k", "k": 4, "rank": 8, "num_heads": 4} | VARIANTS[variant]
    model = qpeft.get_qpeft_model(tiny_lm(family), qpeft.QPeftConfig(**options), tiny_tokenizer())
    batch = model.encode(PAIRS)

    def loss() -> torch.Tensor:
        table = model(batch).mean_query_log_likelihood.view(2, 4)
        return pointwise_pairwise(table, POSITIVE, torch.ones_like(POSITIVE))

    model.train()  # where a score gate chooses 2k clues
    with torch.no_grad():
        before = float(loss())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(12):
        optimizer.zero_grad()
        value = loss()
        if float(value.detach()) < before - 0.15:
            break
        value.backward()
        optimizer.step()
    with torch.no_grad():
        assert float(loss()) < before - 0.1

    assert_same(scores_and_gradients(model, "document_first", max_tokens_per_batch=128),
                scores_and_gradients(model, "plain"))  # fmt: skip

    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = qpeft.QPeftModel.from_pretrained(tmp_path / "adapter", tiny_lm(family), tiny_tokenizer())
    assert torch.equal(loaded.score(PAIRS).query_log_likelihood, model.score(PAIRS).query_log_likelihood)
    ranked = qpeft.Reranker(loaded).rank(QUERIES[0], DOCUMENTS)
    assert sorted(row["corpus_id"] for row in ranked) == [0, 1, 2, 3]
    assert ranked[0]["score"] > ranked[-1]["score"]

    reranker = qpeft.Reranker(loaded)
    similarities = reranker.similarity(QUERIES, [DOCUMENTS] * 2)
    expected = [[similarity_alone(reranker, query, document) for document in DOCUMENTS] for query in QUERIES]
    torch.testing.assert_close(torch.tensor(similarities), torch.tensor(expected), rtol=0, atol=1e-4)
    assert (torch.tensor(similarities).unique().numel() > 2) == (variant != "random" and "source" not in options)


def similarity_alone(reranker: qpeft.Reranker, query: str, document) -> float:
    """The sum over the clues that `explain` shows; without clue tokens, over the k most similar of the document."""
    model = reranker.model
    config = model.qpeft_config
    if config.clues == "top_k":
        return sum(token.weight for token in reranker.explain(query, document, DOCUMENTS).tokens)
    batch = model.encode([(query, document)])
    dropped = {*model.tokenizer.all_special_ids, *(batch.queries[0] if "query_tokens" in config.filters else ())}
    ids = sorted(set(batch.documents[0].document_ids) - dropped)
    unit = torch.nn.functional.normalize(model.engine.table, dim=-1)
    similarity = unit[ids] @ unit[list(batch.queries[0])].T
    return float(similarity.amax(1).sort(descending=True).values[: config.k].sum())
