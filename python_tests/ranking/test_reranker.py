"""Reranker: the shapes of CrossEncoder, batches over queries, explanations."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from families.tiny import DOCUMENTS, PAIRS, QUERIES, tiny_lm, tiny_tokenizer

import qpeft_ext as qpeft
from qpeft_ext.prompts.prompt import document_text


@pytest.fixture(scope="module", params=["attention", "top_k", "none"])
def model(request):
    config = qpeft.QPeftConfig(clues=request.param, num_heads=4, k=5, rank=8)
    return qpeft.get_qpeft_model(tiny_lm("llama"), config, tiny_tokenizer())


def test_predict_keeps_the_order_and_gives_float32(model):
    scores = qpeft.Reranker(model).predict(PAIRS)
    assert scores.shape == (len(PAIRS),) and scores.dtype == np.float32
    for pair, score in zip(PAIRS, scores, strict=True):
        assert qpeft.Reranker(model).predict(pair) == pytest.approx(float(score), abs=1e-4)


def test_rank_sorts_and_can_return_the_documents(model):
    reranker = qpeft.Reranker(model)
    ranked = reranker.rank(QUERIES[0], DOCUMENTS, top_k=3, return_documents=True)
    assert len(ranked) == 3 and set(ranked[0]) == {"corpus_id", "score", "text"}
    scores = reranker.predict([(QUERIES[0], document) for document in DOCUMENTS])
    assert [row["corpus_id"] for row in ranked] == np.argsort(-scores, kind="stable")[:3].tolist()
    assert ranked[0]["text"] == document_text(DOCUMENTS[ranked[0]["corpus_id"]])


def test_rank_many_equals_rank(model, monkeypatch):
    monkeypatch.setattr("qpeft_ext.ranking.lists._PAIRS_PER_BLOCK", 5)  # several blocks
    reranker = qpeft.Reranker(model, cache=qpeft.DocumentCache(1 << 20))
    queries, candidates = [*QUERIES, "none", "sea"], [DOCUMENTS, DOCUMENTS[:2], [], DOCUMENTS[::-1]]
    together = reranker.rank_many(queries, candidates)
    assert [len(rows) for rows in together] == [4, 2, 0, 4]
    for query, documents, rows in zip(queries, candidates, together, strict=True):
        alone = qpeft.Reranker(model).rank(query, documents)
        assert [r["corpus_id"] for r in rows] == [r["corpus_id"] for r in alone]
        assert [r["score"] for r in rows] == pytest.approx([r["score"] for r in alone], abs=1e-4)


def test_equal_scores_keep_the_given_order(model):
    ranked = qpeft.Reranker(model, deterministic=True).rank(QUERIES[0], ["same"] * 3)
    assert [row["corpus_id"] for row in ranked] == [0, 1, 2]


@pytest.mark.slow
def test_compiled_suffix_passes_give_the_same_scores():
    model = qpeft.get_qpeft_model(tiny_lm("llama"), qpeft.QPeftConfig(clues="top_k", k=3, rank=8), tiny_tokenizer())
    expected = qpeft.Reranker(model).predict(PAIRS)
    model.engine.compile(backend="eager")  # the graph is what we answer for; inductor takes minutes
    torch._dynamo.utils.counters.clear()
    np.testing.assert_allclose(qpeft.Reranker(model, compile=True).predict(PAIRS), expected, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_prefix_pass_ends_with_the_last_keys(model):
    calls = []
    hooks = [
        layer.mlp.register_forward_hook(lambda *_, i=i: calls.append(i))
        for i, layer in enumerate(model.engine.decoder.layers)
    ]
    try:
        model.engine.prefill([[1, 2, 3]])
    finally:
        for hook in hooks:
            hook.remove()
    assert calls == [0]


def test_truncated_documents_are_counted(model):
    reranker = qpeft.Reranker(model)
    reranker.predict([("a", "x" * 1000), ("a", "short"), ("b", "x" * 1000)])
    assert reranker.truncated == 1  # a document, not a pair


def test_explanations_point_into_the_text(model):
    explanation = qpeft.Reranker(model).explain(QUERIES[1], DOCUMENTS[3])
    assert explanation.text == DOCUMENTS[3]
    if model.clues is None:
        assert explanation.clues == []
        return
    for span in explanation.clues:
        assert explanation.text[span.start : span.end] == span.token
        assert span.query_token in "boats"
    weights = [span.weight for span in explanation.clues]
    assert weights == sorted(weights, reverse=True)
    if model.qpeft_config.clues == "top_k":
        found = {span.token for span in explanation.clues}
        assert len(found) >= 4 and found < set(" boats")  # k = 5 of the six tokens of the query
    else:
        assert 0.9 < sum(weights) <= 1.001  # the space before the text is left out


def test_similarity_needs_no_language_model_pass(model, monkeypatch):
    monkeypatch.setattr(type(model), "forward", lambda *a, **o: pytest.fail("the LM was run"))
    scores = qpeft.Reranker(model).similarity(QUERIES, [DOCUMENTS, DOCUMENTS[:1]])
    assert [len(row) for row in scores] == [4, 1]
    assert scores[0][2] == 0  # an empty document has no similar token
    assert qpeft.Reranker(model).similarity([QUERIES[0]] * 2, [[], DOCUMENTS[:1]]) == [[], scores[0][:1]]


def test_similarity_knows_which_list_a_document_is_in(monkeypatch):
    monkeypatch.setattr("qpeft_ext.ranking.inspection.PAIRS_PER_LIST_BLOCK", 5)
    config = qpeft.QPeftConfig(clues="top_k", k=12, rank=8, source="candidates")
    reranker = qpeft.Reranker(qpeft.get_qpeft_model(tiny_lm("llama"), config, tiny_tokenizer()))
    lists = [DOCUMENTS[2:], DOCUMENTS[:2], DOCUMENTS, []]
    together = reranker.similarity([QUERIES[0]] * 4, lists)
    assert [len(row) for row in together] == [2, 2, 4, 0]
    assert together == [reranker.similarity([QUERIES[0]], [documents])[0] for documents in lists]
    assert len({row[0] for row in together[:3]}) > 1


def test_a_nan_in_the_language_model_is_an_error():
    model = qpeft.get_qpeft_model(tiny_lm("llama"), qpeft.QPeftConfig(clues="none"), tiny_tokenizer())
    with torch.no_grad():
        model.lm.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="the LM's logits are not finite"):
        qpeft.get_qpeft_model(model.lm, model.qpeft_config, tiny_tokenizer())
    with pytest.raises(ValueError, match="query 'why tides\\?' is not finite"):
        qpeft.Reranker(model).predict(PAIRS)


def test_a_prompt_longer_than_the_context_is_an_error():
    model = qpeft.get_qpeft_model(
        tiny_lm("gpt2"), qpeft.QPeftConfig(clues="none", max_document_tokens=600), tiny_tokenizer()
    )
    with pytest.raises(ValueError, match="does not fit the LM's context of 512"):
        qpeft.Reranker(model).predict([("a", "x" * 600)])


@pytest.mark.parametrize("bad", [[("only one",)], [("a", "b", "c")]])
def test_predict_wants_pairs(model, bad):
    with pytest.raises(ValueError, match="pairs"):
        qpeft.Reranker(model).predict(bad)


@pytest.mark.parametrize("options", [{}, {"generated_lora_rank": 2, "target_modules": "all-linear"}], ids=str)
def test_threads_take_turns(options):
    """A pass sets hooks in the LM: without turns nearly every call of eight threads raised or returned other scores."""
    model = qpeft.get_qpeft_model(tiny_lm("llama"), qpeft.QPeftConfig(clues="top_k", k=3, **options), tiny_tokenizer())
    if model.generated_lora is not None:
        for parameter in model.generated_lora.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    rerankers = [qpeft.Reranker(model), qpeft.Reranker(model, cache=qpeft.DocumentCache(1 << 20))]
    calls = [[(f"{query} {'sea ' * n}", document) for document in DOCUMENTS] for n in range(4) for query in QUERIES]
    expected = [rerankers[0].predict(pairs) for pairs in calls]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with ThreadPoolExecutor(8) as threads:
            scores = list(threads.map(lambda i: rerankers[i % 2].predict(calls[i % len(calls)]), range(2 * len(calls))))
    finally:
        sys.setswitchinterval(interval)
    for i, ours in enumerate(scores):
        np.testing.assert_allclose(ours, expected[i % len(calls)], atol=1e-3)


def test_long_queries_are_cut_and_counted(model):
    queries = ["tides " * 20, "boats", "tides " * 30]
    with pytest.raises(ValueError, match="truncate_queries"):
        qpeft.Reranker(model).rank_many(queries, [DOCUMENTS] * 3)
    reranker = qpeft.Reranker(model, truncate_queries=True)
    got = reranker.rank_many(queries, [DOCUMENTS] * 3)
    assert reranker.truncated_queries == 2
    cut = (" " + "tides " * 20)[:64]  # a byte is a token
    expected = dict(enumerate(qpeft.Reranker(model).predict([(cut, document) for document in DOCUMENTS])))
    for rows in (got[0], got[2]):
        for row in rows:
            assert row["score"] == pytest.approx(expected[row["corpus_id"]], abs=2e-3)
    assert reranker.explain(queries[0], DOCUMENTS[0]).query == queries[0]
    assert reranker.similarity(queries[:1], [DOCUMENTS])[0] == reranker.similarity([cut], [DOCUMENTS])[0]


def test_a_reranker_says_what_it_is(model):
    text = repr(qpeft.Reranker(model, cache=qpeft.DocumentCache(1 << 20), deterministic=True))
    clues = {"attention": "attention clues (4 heads)", "top_k": "top_k clues (k=5)", "none": "no clues"}
    for words in (
        "LlamaForCausalLM",
        "float32 on cpu",
        clues[model.qpeft_config.clues],
        "adapter: in memory",
        "deterministic, document_first",
        "DocumentCache(device: 0 prefixes",
    ):
        assert words in text
    assert "no cache" in repr(qpeft.Reranker(model))
