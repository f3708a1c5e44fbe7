"""An LM whose embeddings or head become other modules after a model was made around it."""

from __future__ import annotations

import pytest
import torch
from families.tiny import PAIRS, own_scores, tiny_lm, tiny_tokenizer

import qpeft_ext as qpeft


def model_of(lm, **options) -> qpeft.QPeftModel:
    return qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(**{"clues": "none"} | options), tiny_tokenizer())


def assert_own_scores(model, before) -> None:
    scores = model.score(PAIRS).query_log_likelihood
    torch.testing.assert_close(scores, own_scores(model, PAIRS), rtol=0, atol=4e-5)
    assert float((scores - before).abs().max()) > 0.01


def test_another_head():
    lm = tiny_lm("llama")
    model = model_of(lm)
    before = model.score(PAIRS).query_log_likelihood
    torch.manual_seed(1)
    lm.set_output_embeddings(torch.nn.Linear(*lm.get_output_embeddings().weight.shape[::-1], bias=False))
    assert_own_scores(model, before)


def test_an_adapter_that_is_put_into_the_head_and_taken_out():
    peft = pytest.importorskip("peft")
    lm = tiny_lm("llama")
    model = model_of(lm)
    before = model.score(PAIRS).query_log_likelihood
    lora = peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    wrapped = peft.get_peft_model(lm, lora)
    assert_own_scores(model, before)
    wrapped.unload()
    torch.testing.assert_close(model.score(PAIRS).query_log_likelihood, before, rtol=0, atol=0)


def test_an_adapter_that_is_put_into_the_embeddings_is_refused():
    peft = pytest.importorskip("peft")
    lm = tiny_lm("llama")
    model = model_of(lm, clues="top_k")
    lora = peft.LoraConfig(r=2, target_modules=["embed_tokens"], task_type="CAUSAL_LM", init_lora_weights=False)
    peft.get_peft_model(lm, lora)
    with pytest.raises(ValueError, match="merge_and_unload"):
        model.score(PAIRS)


@pytest.mark.parametrize("more", [8, -8])
def test_other_token_ids_are_refused(more):
    lm = tiny_lm("llama")
    model = model_of(lm, clues="top_k")
    rows = len(lm.get_input_embeddings().weight)
    lm.resize_token_embeddings(rows + more, mean_resizing=False)
    with pytest.raises(ValueError, match=f"has {rows + more} input embeddings, and had {rows} when the model was made"):
        model.score(PAIRS)
    lm.resize_token_embeddings(rows, mean_resizing=False)
    assert torch.isfinite(model.score(PAIRS).query_log_likelihood).all()


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_tuples_in_the_place_of_outputs_are_refused(family):
    lm = tiny_lm(family)
    model = model_of(lm)
    before = model.score(PAIRS).query_log_likelihood
    lm.config.return_dict = False
    with pytest.raises(
        ValueError, match=rf"this {family} LM has return_dict=False, .* set lm.config.return_dict = True"
    ):
        model.score(PAIRS)
    with pytest.raises(ValueError, match="set lm.config.return_dict = True"):
        model_of(lm)
    lm.config.return_dict = True
    torch.testing.assert_close(model.score(PAIRS).query_log_likelihood, before, rtol=0, atol=0)
