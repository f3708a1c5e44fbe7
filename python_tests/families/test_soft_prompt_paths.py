"""The soft prompt in several families: both paths agree, with the LM itself, and whatever pads a batch."""

from __future__ import annotations

import peft
import pytest
import torch
from test_families import assert_as_exact, assert_same, scores_and_gradients
from tiny import DOCUMENTS, PAIRS, QUERIES, tiny_lm, tiny_tokenizer

import qpeft_ext as qpeft

pytestmark = pytest.mark.slow

# windows (in two layers) that reach from the query back to the soft prompt of the shorter documents
FAMILIES = {"llama": {}, "mistral": {"sliding_window": 16}, "gemma3": {"sliding_window": 16}, "gpt2": {}, "bloom": {}}
P = 6


def trained_model(lm, clues: str = "none", **options) -> qpeft.QPeftModel:
    """A model whose modules have left their start, as after training."""
    config = qpeft.QPeftConfig(clues=clues, num_heads=4, k=5, rank=8, num_virtual_tokens=P, **options)
    model = qpeft.get_qpeft_model(lm, config, tiny_tokenizer())
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.trained_modules.values():
            for parameter in module.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request):
    return tiny_lm(request.param, **FAMILIES[request.param])


def test_document_first_equals_plain(lm):
    model = trained_model(lm, "attention", soft_prompt_mlp=4)
    plain = scores_and_gradients(model, "plain")
    of_soft_prompt = [float(gradient.norm()) for name, gradient in plain[1].items() if "soft_prompt" in name]
    assert len(of_soft_prompt) == 5 and min(of_soft_prompt) > 1e-3
    assert_same(scores_and_gradients(model, "document_first", cache=qpeft.DocumentCache()), plain)
    assert_same(scores_and_gradients(model, "document_first", max_tokens_per_batch=100), plain)
    assert_same(scores_and_gradients(model, "document_first", deterministic=True), plain)
    model.qpeft_config.suffix_micro_batch = 2  # several suffix passes to a prefix, recomputed in the backward pass
    assert_same(scores_and_gradients(model, "document_first"), plain)
    assert_same(scores_and_gradients(model, "plain"), plain)


def by_hand(model, query: str, document) -> float:
    """The score from one unpadded forward of the LM, its input put together here."""
    embedding, tokenizer = model.lm.get_input_embeddings(), model.tokenizer
    text = document if isinstance(document, str) else f"{document['title']} {document['text']}"

    def embed(words: str) -> torch.Tensor:
        return embedding(torch.tensor(tokenizer(words, add_special_tokens=False)["input_ids"], dtype=torch.long))

    target = tokenizer(f" {query}", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        virtual = model.soft_prompt.rows * model.engine.scale
        bos = embedding(torch.tensor([tokenizer.bos_token_id]))
        parts = [bos, virtual, embed(f" Passage: {text}\n" if text else " Passage:\n"), embed(f"Question: {query}")]
        log_p = model.lm(inputs_embeds=torch.cat(parts)[None]).logits[0].log_softmax(-1)
    return float(sum(log_p[-len(target) - 1 + i, token] for i, token in enumerate(target)))


def test_scores_equal_the_lm_by_hand_whatever_the_padding(lm, monkeypatch):
    """peft's prompt tuning pads between the virtual tokens and the text; a score then hangs on the batch."""
    model = trained_model(lm)
    expected = torch.tensor([by_hand(model, *pair) for pair in PAIRS])
    assert expected.std() > 0.5
    for path in ("plain", "document_first"):
        torch.testing.assert_close(model.score(PAIRS, path=path).query_log_likelihood, expected, rtol=0, atol=1e-4)
    monkeypatch.setattr(
        "qpeft_ext.engine.schedule.tokens_worth_a_pass", lambda *_: 1 << 20
    )  # all documents in one pass
    for pad in (1, 8, 32, 128):
        together = [*PAIRS, (QUERIES[0], DOCUMENTS[3] + "!" * pad)]
        for path in ("plain", "document_first"):
            scores = model.score(together, path=path, max_tokens_per_batch=1 << 20)
            tokens = scores.num_tokens[:-1]
            mean = scores.mean_query_log_likelihood[:-1]
            torch.testing.assert_close(mean, expected / tokens, rtol=0, atol=1e-5)


def test_the_text_is_where_it_starts(lm):
    """With as many virtual tokens as the instruction has: the same score as with the text, MLP or not."""
    text = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="none", instruction="Ask!"), tiny_tokenizer())
    expected = text.score(PAIRS).mean_query_log_likelihood
    for mlp in (None, 4):
        soft = qpeft.QPeftConfig(clues="none", instruction="Ask!", num_virtual_tokens=4, soft_prompt_mlp=mlp)
        scores = qpeft.get_qpeft_model(lm, soft, tiny_tokenizer()).score(PAIRS).mean_query_log_likelihood
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


def test_a_cached_score_is_that_of_the_soft_prompt_of_now(lm):
    model, cache = trained_model(lm), qpeft.DocumentCache()
    for step in range(2):
        for _ in range(2):
            scores = model.score(PAIRS, cache=cache).mean_query_log_likelihood
            torch.testing.assert_close(scores, model.score(PAIRS).mean_query_log_likelihood, rtol=0, atol=1e-5)
        assert (cache.hits, cache.misses) == ((step + 1) * len(DOCUMENTS),) * 2
        model(model.encode(PAIRS)).query_log_likelihood.sum().backward()
        torch.optim.AdamW(model.soft_prompt.parameters(), lr=0.1, fused=True).step()  # as transformers' Trainer


@pytest.mark.parametrize("clues", ["none", "top_k"])
def test_beside_a_lora_and_a_generated_lora(clues):
    lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = trained_model(peft.get_peft_model(tiny_lm("llama"), lora), clues, generated_lora_rank=2)
    plain = scores_and_gradients(model, "plain")
    for part in ("soft_prompt", "lora_A.default", "generated_lora", *(("clues",) if clues != "none" else ())):
        assert any(part in name for name in plain[1]), part
    assert_as_exact(scores_and_gradients(model, "document_first", max_tokens_per_batch=100), plain, model)


def test_equal_to_prompt_tuning_of_peft():
    """Where peft is right, which is without padding; and without a first token, which it puts after its own."""
    lm, tokenizer = tiny_lm("llama"), tiny_tokenizer("$A")
    model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="none", num_virtual_tokens=P), tokenizer)
    theirs = peft.get_peft_model(
        tiny_lm("llama"),
        peft.PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=P, token_dim=32, num_attention_heads=4, num_layers=2
        ),
    )
    with torch.no_grad():
        model.soft_prompt.rows.copy_(theirs.prompt_encoder["default"].embedding.weight)
    for query, document in PAIRS:
        prefix, target = model.prompt.documents([document])[0].ids, model.prompt.queries([query])[0]
        ids = torch.tensor([[*prefix[P:], *model.prompt.suffix.bare_question, *target]])
        with torch.no_grad():
            log_p = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].log_softmax(-1)
        expected = sum(log_p[-len(target) - 1 + i, token] for i, token in enumerate(target))
        ours = model.score([(query, document)]).query_log_likelihood
        assert float(ours - expected) / len(target) == pytest.approx(0, abs=1e-5)


def test_a_model_with_recurrent_state():
    model = trained_model(tiny_lm("mamba"))
    together = model.score(PAIRS).mean_query_log_likelihood
    alone = torch.cat([model.score([pair]).mean_query_log_likelihood for pair in PAIRS])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert scores_and_gradients(model, "document_first")[1]["soft_prompt.rows"].norm() > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = trained_model(tiny_lm("llama", dtype=dtype), "attention")
    exact = trained_model(tiny_lm("llama"), "attention").score(PAIRS).mean_query_log_likelihood
    scores, gradients = scores_and_gradients(model, "document_first")
    torch.testing.assert_close(scores, exact, rtol=0.1, atol=0.1)
    assert gradients["soft_prompt.rows"].dtype == torch.float32 and gradients["soft_prompt.rows"].isfinite().all()
