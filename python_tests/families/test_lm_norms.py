"""Norms of bfloat16 layers in one pass: in which families, with which numbers, and that nothing else is changed."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from test_families import scores_and_gradients
from tiny import FAMILIES, PAIRS, tiny_lm, tiny_tokenizer

import qpeft_ext as qpeft
from qpeft_ext.ops.hardware import has_bfloat16_products

pytestmark = pytest.mark.slow

native = pytest.mark.skipif(not has_bfloat16_products(), reason="this processor has no products of bfloat16")
OTHERS = {"gpt2", "gpt_neox", "bloom", "opt", "gemma2", "gemma3", "cohere"}  # layer norms, or 1 is added to the weight
CONFIG = qpeft.QPeftConfig(num_heads=4, rank=8)


def forwards(lm):
    return [module for module in lm.modules() if "forward" in vars(module)]


@native
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_gradients_are_as_near_to_float32(family):
    """Also with the weights of the norms somewhere: at their start, 1, a weight too many would not be seen."""
    found = {}
    for name, dtype in (("exact", torch.float32), ("ours", torch.bfloat16), ("theirs", torch.bfloat16)):
        lm = tiny_lm(family, dtype=dtype)
        torch.manual_seed(2)
        with torch.no_grad():
            for parameter in lm.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn(parameter.shape).to(dtype))
        model = qpeft.get_qpeft_model(lm, CONFIG, tiny_tokenizer())
        assert bool(model.engine.lm_passes.norms) == (dtype == torch.bfloat16 and family not in OTHERS)
        if name == "theirs":
            model.engine.lm_passes = replace(model.engine.lm_passes, norms=())
        scores, gradients = scores_and_gradients(model, "document_first")
        assert not forwards(lm)
        found[name] = scores, torch.cat([g.flatten() for g in gradients.values()])
    for exact, ours, theirs in zip(*found.values(), strict=True):
        assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm() + 1e-3 * exact.norm()


@native
def test_norms_that_are_trained_keep_their_own_forward():
    lm = tiny_lm("llama", dtype=torch.bfloat16)
    model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="none", train_lm=True), tiny_tokenizer())
    model(model.encode(PAIRS)).query_log_likelihood.sum().backward()
    assert all(module.weight.grad.abs().sum() > 0 for module in model.engine.lm_passes.norms)


@native
def test_a_forward_of_someone_else_is_left_alone():
    lm = tiny_lm("llama", dtype=torch.bfloat16)
    norm, seen = lm.get_decoder().norm, []
    own = norm.forward
    norm.forward = lambda x: seen.append(1) or own(x)
    model = qpeft.get_qpeft_model(lm, CONFIG, tiny_tokenizer())
    assert norm not in model.engine.lm_passes.norms and model.engine.lm_passes.norms
    seen.clear()
    expected = model.score(PAIRS).query_log_likelihood
    assert seen and forwards(lm) == [norm]
    later = model.engine.lm_passes.norms[0]
    later.forward = lambda x, own=later.forward: seen.append(2) or own(x)  # a hook that comes after
    assert torch.allclose(model.score(PAIRS).query_log_likelihood, expected, rtol=1e-2)
    assert 2 in seen and forwards(lm) == [later, norm]


@native
def test_a_copy_of_the_model_has_its_own_norms():
    model = qpeft.get_qpeft_model(tiny_lm("llama", dtype=torch.bfloat16), CONFIG, tiny_tokenizer())
    other, expected = copy.deepcopy(model), model.score(PAIRS).query_log_likelihood
    with torch.no_grad():
        for norm in model.engine.lm_passes.norms:
            norm.weight.zero_()
    assert torch.equal(other.score(PAIRS).query_log_likelihood, expected)


@native
def test_an_error_gives_the_forward_back():
    model = qpeft.get_qpeft_model(tiny_lm("llama", dtype=torch.bfloat16), CONFIG, tiny_tokenizer())
    with pytest.raises(KeyError), model.engine.lm_passes.prefix():
        assert len(forwards(model.lm)) == len(model.engine.lm_passes.norms)
        raise KeyError
    assert not forwards(model.lm)
