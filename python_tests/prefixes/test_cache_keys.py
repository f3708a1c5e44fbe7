"""A cached prefix is found by the LM and the tokens that it was computed with, and by no others."""

from __future__ import annotations

import peft
import pytest
import torch
from families.tiny import DOCUMENTS, PAIRS, tiny_lm
from tiny_cache import Version, model, prefix, scores

import qpeft_ext as qpeft


def test_deterministic_scores_are_not_taken_from_batches(tmp_path):
    lm = model()
    expected = scores(lm, deterministic=True)
    for cache in (qpeft.DocumentCache(), qpeft.DocumentCache(0, disk=tmp_path, disk_bytes=1 << 30)):
        scores(lm, cache)
        for _ in range(2):
            assert torch.equal(scores(lm, cache, deterministic=True), expected)
        assert cache.hits == len(DOCUMENTS)


def changes():
    """Every way in which an LM can become another one: name -> (LM, what changes it)."""

    def lora(lm=None, **options):
        settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | options
        return peft.get_peft_model(lm or tiny_lm("llama"), peft.LoraConfig(**settings))

    def other_positions(lm):
        lm.config.rope_parameters = lm.config.rope_parameters | {"rope_theta": 500.0}  # what files know
        return lm.model.rotary_emb.inv_freq

    def two_adapters():
        lm = lora()
        lm.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        return lm

    def assign(lm):
        for _ in range(2):  # the second copy may get the first one's address
            lm.load_state_dict({name: 1.1 * value for name, value in lm.state_dict().items()}, assign=True)

    return {
        "in place": (
            tiny_lm,
            lambda lm: (
                lm.get_input_embeddings().weight.data_ptr()
                and torch.no_grad()(lm.get_input_embeddings().weight.mul_)(1.1)
            ),
        ),
        "replaced": (tiny_lm, assign),
        "a buffer in place": (tiny_lm, lambda lm: other_positions(lm).mul_(0.25)),
        "a buffer replaced": (
            tiny_lm,
            lambda lm: setattr(lm.model.rotary_emb, "inv_freq", 0.25 * other_positions(lm)),
        ),
        "dtype": (tiny_lm, lambda lm: lm.to(torch.bfloat16)),
        "another attention": (tiny_lm, lambda lm: lm.set_attn_implementation("eager")),
        "another adapter": (two_adapters, lambda lm: lm.set_adapter("other")),
        "no adapter": (lora, lambda lm: lm.base_model.disable_adapter_layers()),
        "scaled": (lora, lambda lm: [m.scale_layer(2.0) for m in lm.modules() if hasattr(m, "scale_layer")]),
        "merged": (lora, lambda lm: lm.merge_adapter()),
    }


@pytest.mark.parametrize("change", changes())
def test_a_changed_lm_misses(change, tmp_path):
    make, apply = changes()[change]
    lm = model(make("llama") if make is tiny_lm else make())
    cache = qpeft.DocumentCache(disk=tmp_path, disk_bytes=1 << 30)
    cache.put(cache.key(Version(), [1]), prefix(1, 1))
    stale = scores(lm, cache)
    assert cache.hits == 0
    apply(lm.lm)
    fresh = scores(lm, cache)
    assert cache.hits == 0 and torch.equal(fresh, scores(lm))
    if change not in ("another attention", "merged"):  # those compute the same
        assert not torch.allclose(fresh, stale, atol=1e-3)


def test_a_changed_text_or_template_misses():
    query, document = PAIRS[0]
    lm, cache = model(), qpeft.DocumentCache()
    for text in (document, document + "!"):
        lm.score([(query, {"id": "1", "text": text})], cache=cache)
    model(lm.lm, instruction="Another one.").score([(query, document)], cache=cache)
    model(lm.lm, max_document_tokens=3).score([(query, document)], cache=cache)
    assert (cache.hits, cache.misses) == (0, 4)
    model(lm.lm).score([(query, document)], cache=cache)  # another model around the same LM shares
    assert cache.hits == 1


def test_two_lms_share_nothing():
    cache = qpeft.DocumentCache()
    for _ in range(3):  # each may get the addresses of the one before
        scores(model(tiny_lm("llama")), cache)
    assert cache.hits == 0


def test_prefixes_of_an_lm_that_changed_are_not_written(tmp_path):
    lm, cache = model(), qpeft.DocumentCache(1 << 20, disk=tmp_path, disk_bytes=1 << 30)
    scores(lm, cache)
    with torch.no_grad():
        lm.lm.get_input_embeddings().weight.mul_(1.1)
    scores(lm, cache)
    cache._device.max_bytes = 1
    cache.put(cache.key(Version(), [0]), prefix(0, 1))
    for leaving in list(cache._device._entries):
        cache._store(leaving, cache._device.take(leaving), 1)
    assert len(cache._disk) == len(DOCUMENTS) + 1


def test_frozen_dropout_is_never_cached():
    """A LoRA that is not trained must not be dropped from in training: its prefixes are kept."""
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, lora_dropout=0.5)
    lm = peft.get_peft_model(tiny_lm("llama"), lora)
    lm.requires_grad_(False)
    cache, frozen = qpeft.DocumentCache(), model(lm)
    expected = scores(frozen)
    scores(frozen.train(), cache)
    torch.testing.assert_close(scores(frozen.eval(), cache), expected)


def test_with_a_trained_lora_prefixes_get_gradients_and_are_not_cached():
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trained, cache = model(peft.get_peft_model(tiny_lm("llama"), lora)), qpeft.DocumentCache()

    def gradients(**options):
        trained.zero_grad()
        trained(trained.encode(PAIRS), **options).query_log_likelihood.sum().backward()
        return {name: p.grad.clone() for name, p in trained.named_parameters() if p.requires_grad}

    expected = gradients(path="plain")
    for _ in range(2):
        ours = gradients(cache=cache)
        for name, gradient in expected.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-4)
    assert len(cache) == 0 and cache.misses == 0


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_of_a_trained_lora_makes_another_lm(fused):
    """Fused optimizers do not count their writes (torch 2.13)."""
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trained, cache = model(peft.get_peft_model(tiny_lm("llama"), lora)), qpeft.DocumentCache()
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=0.1, fused=fused)
    stale = scores(trained, cache)
    trained(trained.encode(PAIRS)).query_log_likelihood.sum().backward()
    optimizer.step()
    fresh = scores(trained, cache)
    assert cache.hits == 0 and torch.equal(fresh, scores(trained)) and not torch.allclose(fresh, stale, atol=1e-3)
