"""Reranker: the shapes of CrossEncoder, batches over queries, explanations, memory."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from families.tiny import DOCUMENTS, PAIRS, QUERIES, tiny_lm, tiny_tokenizer
from transformers import LlamaForSequenceClassification

import qpeft_ext as qpeft
from qpeft_ext.engine.memory import FIXED_BYTES, bytes_per_token, plan_memory
from qpeft_ext.engine.schedule import document_jobs, prefix_groups, prefix_tokens, suffix_groups, suffix_jobs
from qpeft_ext.ops.hardware import shape_step
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
    monkeypatch.setattr("qpeft_ext.ranking.reranker._PAIRS_PER_BLOCK", 5)  # several blocks
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


def test_out_of_memory_halves_the_batch_and_no_other_error_does(model, monkeypatch):
    reranker = qpeft.Reranker(model, max_tokens_per_batch=256)
    expected, forward, tried = reranker.predict(PAIRS), type(model).forward, []

    def failing(self, *args, **options):
        tried.append(options["max_tokens_per_batch"])
        if options["max_tokens_per_batch"] > 64:
            raise torch.OutOfMemoryError("pretended")
        return forward(self, *args, **options)

    monkeypatch.setattr(type(model), "forward", failing)
    np.testing.assert_allclose(reranker.predict(PAIRS), expected, atol=1e-4)
    assert tried == [256, 128, 64]
    monkeypatch.setattr(type(model), "forward", lambda *a, **o: (_ for _ in ()).throw(torch.OutOfMemoryError("always")))
    with pytest.raises(torch.OutOfMemoryError):
        reranker.predict(PAIRS)
    assert reranker.max_tokens_per_batch == 1
    monkeypatch.setattr(type(model), "forward", lambda *a, **o: (_ for _ in ()).throw(RuntimeError("other")))
    with pytest.raises(RuntimeError, match="other"):
        reranker.predict(PAIRS)


@pytest.mark.parametrize("cache_bytes", [None, 20_000, 1 << 20])
def test_out_of_memory_in_a_prefix_pass_halves_the_passes(model, monkeypatch, caplog, cache_bytes):
    expected, prefill = qpeft.Reranker(model).predict(PAIRS), model.engine.prefill

    def failing(prefixes):
        if len(prefixes) > 1:
            raise torch.OutOfMemoryError("pretended")
        return prefill(prefixes)

    monkeypatch.setattr(model.engine, "prefill", failing)
    cache = None if cache_bytes is None else qpeft.DocumentCache(cache_bytes)
    reranker = qpeft.Reranker(model, max_tokens_per_batch=256, cache=cache)
    np.testing.assert_allclose(reranker.predict(PAIRS), expected, atol=1e-4)
    assert reranker.max_tokens_per_batch < 256
    assert f"retrying with max_tokens_per_batch={reranker.max_tokens_per_batch}" in caplog.text


def test_a_memory_budget_is_divided(model):
    attention = model.qpeft_config.clues == "attention"
    budget = FIXED_BYTES + (64 << 20)
    plan = plan_memory(model.engine, budget, attention)
    assert plan.max_tokens_per_batch == 2048 and (plan.projected_bytes > 0) == attention
    passes = plan.max_tokens_per_batch * bytes_per_token(model.engine)
    assert FIXED_BYTES + passes + plan.cache_bytes + plan.projected_bytes == budget
    small = plan_memory(model.engine, FIXED_BYTES + 600 * bytes_per_token(model.engine), attention)
    assert small.max_tokens_per_batch == 300
    reranker = qpeft.Reranker(model, max_memory=budget)
    assert (reranker.max_tokens_per_batch, reranker.cache.max_bytes) == (2048, plan.cache_bytes)
    np.testing.assert_allclose(reranker.predict(PAIRS), qpeft.Reranker(model).predict(PAIRS), atol=1e-4)
    for wrong, message in ((FIXED_BYTES, "at least 19"), ("free", "only a CUDA device"), (1.5, "whole number")):
        with pytest.raises(ValueError, match=message):
            qpeft.Reranker(model, max_memory=wrong)


def test_compiled_suffix_passes_give_the_same_scores():
    model = qpeft.get_qpeft_model(tiny_lm("llama"), qpeft.QPeftConfig(clues="top_k", k=3, rank=8), tiny_tokenizer())
    expected = qpeft.Reranker(model).predict(PAIRS)
    model.engine.compile(backend="eager")  # the graph is what we answer for; inductor takes minutes
    torch._dynamo.utils.counters.clear()
    np.testing.assert_allclose(qpeft.Reranker(model, compile=True).predict(PAIRS), expected, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("max_pairs", [1, 3, 100])
def test_every_pair_is_in_one_pass_and_padding_is_bounded(model, max_pairs):
    queries = ["a" * n for n in (3, 9, 4, 9, 5)]
    documents = ["b" * n for n in range(5, 60, 6)]
    batch = model.encode([(query, document) for query in queries for document in documents])
    for jobs in (document_jobs(batch, max_pairs), suffix_jobs(batch, max_pairs)):
        assert sorted(i for job in jobs for i in job) == list(range(len(batch)))
    for job in document_jobs(batch, max_pairs):
        assert {batch.pairs[i][1] for i in job}.isdisjoint(
            {batch.pairs[i][1] for i in range(len(batch)) if i not in job}
        )
    seen = []
    for group in prefix_groups(batch, 150, 10):
        lengths = [len(batch.documents[d].ids) for d in group]
        assert len(group) == 1 or len(group) * max(lengths) <= 150
        assert sum(max(lengths) - n for n in lengths) <= 10
        for step in (1, 4):
            for rows in suffix_groups(batch, group, 100, None, 6, True, False, step):
                lengths = [len(batch.queries[batch.pairs[i][0]]) for i in rows]
                assert sum(max(lengths) - n for n in lengths) <= 6
                seen += rows
    assert sorted(seen) == sorted(2 * list(range(len(batch))))


def test_passes_have_multiples_of_pairs_where_they_can(model):
    batch = model.encode([("a" * (3 + n % 5), "b" * 20 + str(n)) for n in range(45)])
    documents = list(range(len(batch.documents)))
    for max_tokens, max_pairs in ((140, None), (10_000, 11), (10_000, None), (1, None)):
        sizes = []
        for step in (1, 4):
            groups = list(suffix_groups(batch, documents, max_tokens, max_pairs, 1000, True, False, step))
            assert sorted(i for group in groups for i in group) == list(range(45))
            sizes.append([len(group) for group in groups])
        assert max(sizes[1]) <= max(sizes[0])
        assert all(size % 4 == 0 for size in sizes[1][:-1] if size >= 4)
    assert sizes[1] == [1] * 45
    assert {
        (device, dtype): shape_step(torch.device(device), dtype)
        for device in ("cpu", "cuda")
        for dtype in (torch.bfloat16, torch.float32)
    } == {
        ("cpu", torch.bfloat16): 8,
        ("cpu", torch.float32): 1,
        ("cuda", torch.bfloat16): 1,
        ("cuda", torch.float32): 1,
    }


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
    monkeypatch.setattr("qpeft_ext.ranking.reranker._PAIRS_PER_LIST_BLOCK", 5)
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


def test_fewer_prefixes_are_held_on_a_cpu_unless_they_are_in_memory_anyway():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [prefix_tokens(2048, device, False) for device in (cpu, cuda)] == [1024, 2048]
    assert [prefix_tokens(2048, device, True) for device in (cpu, cuda)] == [16384, 16384]
    assert prefix_tokens(1, cpu, False) == 1  # after halving for want of memory


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


class TextGenerationPipeline:
    def __init__(self, model, tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer


WRONG_MODELS = {
    "a name": (lambda lm, tok, conf: qpeft.get_qpeft_model("gpt2", conf), "the string 'gpt2'; load_lm(name) loads one"),
    "a path": (lambda lm, tok, conf: qpeft.QPeftModel(Path("x"), conf, tok), "load_lm(name) loads one"),
    "a pipeline": (
        lambda lm, tok, conf: qpeft.get_qpeft_model(TextGenerationPipeline(lm, tok), conf),
        "a pipeline (TextGenerationPipeline); give its model: pipeline.model",
    ),
    "a class": (lambda lm, tok, conf: qpeft.get_qpeft_model(type(lm), conf, tok), "LlamaForCausalLM.from_pretrained"),
    "a tokenizer": (lambda lm, tok, conf: qpeft.get_qpeft_model(tok, conf, lm), "got a tokenizer"),
    "a config": (lambda lm, tok, conf: qpeft.get_qpeft_model(conf, lm, tok), "a QPeftConfig, which comes after the LM"),
    "a classifier": (
        lambda lm, tok, conf: qpeft.get_qpeft_model(LlamaForSequenceClassification(lm.config), conf, tok),
        "a LlamaForSequenceClassification, which does not write text; load the LM itself",
    ),
    "a module": (lambda lm, tok, conf: qpeft.get_qpeft_model(torch.nn.Linear(2, 2), conf, tok), "the module Linear"),
    "a model of ours": (
        lambda lm, tok, conf: qpeft.get_qpeft_model(qpeft.get_qpeft_model(lm, conf, tok), conf, tok),
        "take its own: model.lm",
    ),
    "options": (lambda lm, tok, conf: qpeft.get_qpeft_model(lm, {"clues": "none"}, tok), "config must be a QPeftCon"),
    "swapped": (lambda lm, tok, conf: qpeft.QPeftModel(lm, tok, conf), "got a tokenizer, which comes after it"),
    "a tokenizer's name": (lambda lm, tok, conf: qpeft.get_qpeft_model(lm, conf, "gpt2"), "AutoTokenizer.from_pretr"),
    "an LM": (lambda lm, tok, conf: qpeft.Reranker(lm), "wrap it: Reranker(get_qpeft_model(lm, QPeftConfig("),
    "an adapter's name": (lambda lm, tok, conf: qpeft.Reranker("my-adapter"), "Reranker.from_pretrained(…) loads an"),
    "a tokenizer to rank": (lambda lm, tok, conf: qpeft.Reranker(tok), "model must be a QPeftModel, got a tokenizer"),
}


@pytest.mark.parametrize("name", WRONG_MODELS)
def test_what_is_no_lm_is_an_error_that_names_the_right_call(name):
    call, words = WRONG_MODELS[name]
    with pytest.raises(TypeError) as caught:
        call(tiny_lm("llama"), tiny_tokenizer(), qpeft.QPeftConfig(clues="none"))
    message = str(caught.value)
    assert words in message and "\n" not in message and len(message) <= 300
