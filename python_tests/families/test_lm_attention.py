"""Attention of the engine's passes: a head of keys is read once for all queries of its group, bfloat16 by AMX."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_families import assert_same, scores_and_gradients
from tiny import FAMILIES, PAIRS, tiny_lm, tiny_tokenizer
from torch import nn
from transformers import AttentionInterface
from transformers.integrations import sdpa_attention

import qpeft_ext as qpeft
from qpeft_ext.lm import attention as lm_attention
from qpeft_ext.lm.attention import OURS, SDPA, attention
from qpeft_ext.ops.bfloat16_attention import bfloat16_attention
from qpeft_ext.ops.hardware import multiplies_bfloat16_by_tiles

pytestmark = pytest.mark.slow

UNGROUPED = {"gpt2", "gpt_neox", "bloom", "opt"}  # a head of keys for every head of queries
EAGER = {"gemma2"}  # whose soft cap "sdpa" does not have


class Attention(nn.Module):
    num_key_value_groups, is_causal = 3, True


@pytest.mark.parametrize("kind", ["bool", "float", "one for all rows", "none"])
def test_it_is_the_attention_of_transformers(kind):
    generator = torch.Generator().manual_seed(0)
    B, heads, L, S, D = 2, 2, 5, 11, 4
    inputs = [
        torch.randn(shape, generator=generator, requires_grad=True)
        for shape in ((B, heads * 3, L, D), (B, heads, S, D), (B, heads, S, D + 2))
    ]
    keep = torch.rand(B, 1, L, S, generator=generator) < 0.6
    keep[..., 0] = True
    mask = {
        "bool": keep,
        "float": torch.zeros(keep.shape).masked_fill(~keep, -1e9),
        "one for all rows": keep[:1],
        "none": None,
    }[kind]
    found, expected = (
        [function(Attention(), *inputs, mask, scaling=0.7, is_causal=False)[0]]
        for function in (attention, sdpa_attention.sdpa_attention_forward)
    )
    for outputs in (found, expected):
        outputs += torch.autograd.grad(outputs[0].square().sum(), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_which_families_have_it(family, monkeypatch):
    """Nothing is repeated in passes over prefixes and suffixes; the user's calls are as before."""
    lm = tiny_lm(family)
    before = lm.config._attn_implementation
    model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(num_heads=4), tiny_tokenizer())
    assert bool(model.engine.lm_passes.attention) == (family not in UNGROUPED | EAGER)
    seen, repeat = [], sdpa_attention.repeat_kv

    def repeated(states, groups):
        seen.append(groups)
        return repeat(states, groups)

    monkeypatch.setattr(sdpa_attention, "repeat_kv", repeated)
    expected = scores_and_gradients(model, "plain")
    assert bool(seen) == bool(model.engine.lm_passes.attention)
    seen.clear()
    assert_same(scores_and_gradients(model, "document_first"), expected)
    assert not seen
    assert lm.config._attn_implementation == before


@pytest.mark.parametrize("fails", [False, True])
def test_an_attention_that_is_not_the_same_is_left_alone(fails, monkeypatch):
    def other(module, query, *args, **kwargs):
        if fails:
            raise TypeError("no such argument")
        return query.transpose(1, 2).contiguous(), None

    monkeypatch.setitem(AttentionInterface._global_mapping, OURS, other)
    lm = tiny_lm("llama")
    assert lm.config._attn_implementation == SDPA
    model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="none", generated_lora_rank=2), tiny_tokenizer())
    assert not model.engine.lm_passes.attention


def test_an_error_gives_the_setting_back():
    model = qpeft.get_qpeft_model(tiny_lm("llama"), qpeft.QPeftConfig(num_heads=4), tiny_tokenizer())
    with pytest.raises(KeyError), model.engine.lm_passes.suffix(torch.arange(3), (1, 3)):
        assert model.lm.config._attn_implementation == OURS
        raise KeyError
    assert model.lm.config._attn_implementation == SDPA


WIDE = {"hidden_size": 128, "head_dim": 32}  # heads of a width that AMX takes
HEAD_32 = {family: WIDE for family in set(FAMILIES) - EAGER - {"gpt2", "bloom"}} | {"gpt2": {"n_embd": 128}}


@pytest.mark.skipif(not multiplies_bfloat16_by_tiles(), reason="this processor has no AMX")
@pytest.mark.parametrize("trained", [{"clues": "attention"}, {"clues": "none", "num_virtual_tokens": 5}],
                         ids=["suffixes", "prefixes too"])  # fmt: skip
@pytest.mark.parametrize("family", sorted(HEAD_32))
def test_bfloat16_by_tiles_is_as_near_to_float32_as_sdpa(family, trained, monkeypatch):
    """Scores and gradients; in all layers of prefix and suffix passes, sliding windows and groups of heads included."""
    calls = []

    def counted(query, key, value, mask, scale):
        calls.append((query.shape[2], key.shape[2]))
        return bfloat16_attention(query, key, value, mask, scale)

    monkeypatch.setattr(lm_attention, "bfloat16_attention", counted)
    config = qpeft.QPeftConfig(num_heads=4, rank=8, **trained)
    found = {}
    for name, dtype in (("exact", torch.float32), ("ours", torch.bfloat16), ("sdpa", torch.bfloat16)):
        lm = tiny_lm(family, dtype=dtype, **HEAD_32[family])
        torch.manual_seed(2)
        model = qpeft.get_qpeft_model(lm, config, tiny_tokenizer())
        if name == "sdpa":
            model.engine.lm_passes = replace(model.engine.lm_passes, attention=())
        calls.clear()
        scores, gradients = scores_and_gradients(model, "document_first")
        assert bool(calls) == (name == "ours") and lm.config._attn_implementation == SDPA
        if calls:
            assert {L < T for L, T in calls} == {False, True}  # prefixes and suffixes
        found[name] = scores, torch.cat([g.flatten() for g in gradients.values()])
    for exact, ours, sdpa in zip(*found.values(), strict=True):
        assert (ours - exact).norm() <= 1.5 * (sdpa - exact).norm() + 1e-3 * exact.norm()


@pytest.mark.skipif(not multiplies_bfloat16_by_tiles(), reason="this processor has no AMX")
def test_a_compiled_pass_stays_whole():
    lm = tiny_lm("llama", dtype=torch.bfloat16, **WIDE)
    model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="none"), tiny_tokenizer())
    expected = qpeft.Reranker(model).predict(PAIRS)
    torch._dynamo.reset()
    model.engine.compile(backend="eager")  # the graph is what we answer for; inductor takes minutes
    torch._dynamo.utils.counters.clear()
    found = qpeft.Reranker(model, compile=True).predict(PAIRS)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(expected), rtol=2e-2, atol=0)
