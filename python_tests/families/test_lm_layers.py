"""Norms, feed-forward layers and rotary embeddings of ours: in which families, with which numbers, and nothing else."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from test_families import scores_and_gradients
from tiny import FAMILIES, PAIRS, tiny_lm, tiny_tokenizer
from torch import nn
from transformers.models.llama import modeling_llama

import qpeft_ext as qpeft
from qpeft_ext.lm import feed_forward, rotary
from qpeft_ext.ops._library import registered

pytestmark = pytest.mark.slow

native = pytest.mark.skipif(not registered("rotary"), reason="the library is not loaded")
OTHER_NORMS = {"gpt2", "gpt_neox", "bloom", "opt", "gemma2", "gemma3", "cohere"}  # layer norms, or weight + 1
GATED = {
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "cohere",
    "granite",
}  # others: no silu, or one weight for two
OTHER_EMBEDDINGS = {"gpt2", "bloom", "opt", "cohere"}  # none, or of pairs of neighbours
CONFIG = qpeft.QPeftConfig(num_heads=4, rank=8)


def forwards(lm):
    return [module for module in lm.modules() if "forward" in vars(module)]


def scores_and_gradient(family, dtype, ours):
    """Compute scores and a gradient, with or without our layers.

    The norms get random weights. They start at 1, where it does not show if a weight is applied twice.
    """
    lm = tiny_lm(family, dtype=dtype)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape).to(dtype))
    model = qpeft.get_qpeft_model(lm, CONFIG, tiny_tokenizer())
    passes = model.engine.lm_passes
    assert bool(passes.norms) == (family not in OTHER_NORMS)
    assert bool(passes.feed_forwards) == (family in GATED)
    assert bool(passes.rotary) == (family not in OTHER_EMBEDDINGS)
    if not ours:
        model.engine.lm_passes = replace(passes, norms=(), feed_forwards=(), rotary=())
    scores, gradients = scores_and_gradients(model, "document_first")
    assert not forwards(lm)
    # an LM that computes something else with ours would be read in whole prompts, without ours
    assert not model.engine.why_not_cached
    return scores, torch.cat([g.flatten() for g in gradients.values()])


@native
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_gradients_are_as_near_to_float32(family):
    found = [scores_and_gradient(family, torch.float32, ours) for ours in (True, False)]
    found += [scores_and_gradient(family, torch.bfloat16, ours) for ours in (True, False)]
    for ours, exact, ours_rounded, theirs_rounded in zip(*found, strict=True):
        assert (ours - exact).norm() <= 3e-5 * exact.norm()
        assert (ours_rounded - exact).norm() <= 1.5 * (theirs_rounded - exact).norm() + 1e-3 * exact.norm()


@native
def test_norms_that_are_trained_keep_their_own_forward():
    lm = tiny_lm("llama")
    model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="none", train_lm=True), tiny_tokenizer())
    model(model.encode(PAIRS)).query_log_likelihood.sum().backward()
    assert all(module.weight.grad.abs().sum() > 0 for module in model.engine.lm_passes.norms)


@native
def test_a_forward_of_someone_else_is_left_alone():
    lm = tiny_lm("llama")
    norm, seen = lm.get_decoder().norm, []
    own = norm.forward
    norm.forward = lambda x: seen.append(1) or own(x)
    model = qpeft.get_qpeft_model(lm, CONFIG, tiny_tokenizer())
    assert norm not in model.engine.lm_passes.norms and model.engine.lm_passes.norms
    seen.clear()
    expected = model.score(PAIRS).query_log_likelihood
    assert seen and forwards(lm) == [norm]
    later = model.engine.lm_passes.feed_forwards[0]
    later.forward = lambda x, own=later.forward: seen.append(2) or own(x)  # a hook that comes after
    assert torch.allclose(model.score(PAIRS).query_log_likelihood, expected, rtol=1e-4)
    assert 2 in seen and set(forwards(lm)) == {later, norm}


@native
def test_a_copy_of_the_model_has_its_own_layers():
    model = qpeft.get_qpeft_model(tiny_lm("llama"), CONFIG, tiny_tokenizer())
    other, expected = copy.deepcopy(model), model.score(PAIRS).query_log_likelihood
    with torch.no_grad():
        for norm in model.engine.lm_passes.norms:
            norm.weight.zero_()
        for module in model.engine.lm_passes.feed_forwards:
            module.down_proj.weight.zero_()
    assert torch.equal(other.score(PAIRS).query_log_likelihood, expected)


@native
def test_an_error_gives_everything_back():
    model = qpeft.get_qpeft_model(tiny_lm("llama"), CONFIG, tiny_tokenizer())
    passes, theirs = model.engine.lm_passes, modeling_llama.apply_rotary_pos_emb
    with pytest.raises(KeyError), passes.prefix():
        assert len(forwards(model.lm)) == len(passes.norms) + len(passes.feed_forwards) == 5 + 2
        assert modeling_llama.apply_rotary_pos_emb is not theirs
        raise KeyError
    assert not forwards(model.lm) and modeling_llama.apply_rotary_pos_emb is theirs


@native
@pytest.mark.parametrize("act_fn", [nn.GELU(), nn.SiLU(), nn.ReLU()])
def test_a_feed_forward_layer_is_ours_if_its_gate_is_silu(act_fn):
    module = tiny_lm("llama").model.layers[0].mlp
    module.act_fn = act_fn
    assert feed_forward.is_ours(module, torch.float32) == isinstance(act_fn, nn.SiLU)
    assert module.gate_proj.weight.shape == (48, 32)  # the stand-ins are gone


@native
def test_a_layer_that_does_more_keeps_its_own_forward():
    module = tiny_lm("llama").model.layers[0].mlp

    class Scaled(type(module)):
        def forward(self, x):
            return super().forward(x) * 1.01

    module.__class__ = Scaled
    assert not feed_forward.is_ours(module, torch.float32)


@native
def test_an_embedding_that_differs_keeps_its_own(monkeypatch):
    decoder = tiny_lm("llama").model
    name = modeling_llama.__name__
    assert rotary.files_with_ours(decoder) == [name]
    own = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(rotary, "_found", {})
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: own(q, k, cos, -sin))
    assert rotary.files_with_ours(decoder) == []
