"""Adapters of peft in the LM: their own scores, or one clear line."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import peft
import pytest
import torch
from tiny import PAIRS, own_scores, tiny_lm, tiny_tokenizer

import qpeft_ext as qpeft

pytestmark = pytest.mark.slow

_TARGETS = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
READABLE = {
    "LoRA": peft.LoraConfig(r=2, **_TARGETS),
    "DoRA": peft.LoraConfig(r=2, use_dora=True, **_TARGETS),
    "LoRA of the head": peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"),
    "IA3": peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"],
                          task_type="CAUSAL_LM"),
    "LoHa": peft.LoHaConfig(r=2, **_TARGETS),
    "LoKr": peft.LoKrConfig(r=2, **_TARGETS),
    "OFT": peft.OFTConfig(oft_block_size=8, **_TARGETS),
    "BOFT": peft.BOFTConfig(**_TARGETS),
    "VeRA": peft.VeraConfig(r=2, **_TARGETS),
    "RandLoRA": peft.RandLoraConfig(r=2, **_TARGETS),
    "LN tuning": peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
}  # fmt: skip
_CALL = (40, 41)
UNREADABLE = {
    "activated LoRA": peft.LoraConfig(r=2, alora_invocation_tokens=list(_CALL), **_TARGETS),
    "ADAPTION_PROMPT": peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM"),
    "POLY": peft.PolyConfig(r=2, **_TARGETS),
}


def model_of(lm) -> qpeft.QPeftModel:
    return qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="none"), tiny_tokenizer())


def with_adapter(config):
    """An adapter that changes something, as after training."""
    lm = tiny_lm("llama")
    before = {name for name, _ in lm.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lm = peft.get_peft_model(lm, config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            of_lm = name.removeprefix("base_model.model.").replace(".base_layer", "") in before
            if not of_lm or parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return lm


@pytest.mark.parametrize("kind", READABLE)
def test_an_adapter_gives_its_own_scores(kind):
    model = model_of(with_adapter(READABLE[kind]))
    assert not model.engine.why_not_cached
    scores = model.score(PAIRS).query_log_likelihood
    torch.testing.assert_close(scores, own_scores(model, PAIRS), rtol=0, atol=4e-5)
    assert float((scores - model_of(tiny_lm("llama")).score(PAIRS).query_log_likelihood).abs().max()) > 0.01


def test_a_mixed_model_gives_its_own_scores():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = peft.LoraConfig(r=2, init_lora_weights=False, **_TARGETS)
        lm = peft.get_peft_model(tiny_lm("llama"), lora, mixed=True)
        lm.add_adapter("other", peft.LoHaConfig(r=2, init_weights=False, **_TARGETS))
    lm.set_adapter(["default", "other"])
    model = model_of(lm.eval())
    torch.testing.assert_close(model.score(PAIRS).query_log_likelihood, own_scores(model, PAIRS), rtol=0, atol=4e-5)


@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_adapter_that_needs_more_than_embeddings_is_refused(kind):
    with pytest.raises(ValueError, match=rf"the LM's adapter 'default' \({kind}\) .* give the LM without it"):
        model_of(with_adapter(UNREADABLE[kind]))


def test_an_activated_lora_that_is_not_active_yet_is_refused_too():
    lm = with_adapter(READABLE["LoRA"])
    lm.add_adapter("asked", UNREADABLE["activated LoRA"])
    with pytest.raises(ValueError, match="'asked' .activated LoRA."):
        model_of(lm)


@pytest.mark.parametrize("kind", ["XLORA", "SHADOW", "LILY"])
def test_a_fresh_adapter_that_changes_nothing_yet_is_refused_by_its_kind(kind):
    lm = tiny_lm("llama")
    lm.peft_config = {"default": SimpleNamespace(peft_type=kind)}
    with pytest.raises(ValueError, match=kind):
        model_of(lm)


def test_an_adapter_on_a_few_embeddings_is_refused():
    """Whichever they are: clues take the table's rows."""
    tokens = peft.TrainableTokensConfig(token_indices=[200, 201], target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match="merge_and_unload"):
        model_of(with_adapter(tokens))
    model = model_of(with_adapter(tokens).merge_and_unload())
    torch.testing.assert_close(model.score(PAIRS).query_log_likelihood, own_scores(model, PAIRS), rtol=0, atol=4e-5)


def test_experts_chosen_by_all_tokens_of_a_batch_are_not_causal():
    lm = tiny_lm("llama")
    lm.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: output * (1 + output.mean()))
    with pytest.raises(ValueError, match="see those behind them"):
        model_of(lm)
