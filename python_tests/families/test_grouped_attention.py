"""Suffix passes read the keys and values of a head once for all queries of its group."""

from __future__ import annotations

import pytest
import torch
from test_families import assert_same, scores_and_gradients
from tiny import FAMILIES, tiny_lm, tiny_tokenizer
from torch import nn
from transformers import AttentionInterface
from transformers.integrations import sdpa_attention

import qpeft_ext as qpeft
from qpeft_ext.grouped_attention import GROUPED, SDPA, grouped_sdpa

UNGROUPED = {"gpt2", "gpt_neox", "bloom", "opt"}  # a head of keys for every head of queries
EAGER = {"gemma2"}  # whose soft cap "sdpa" does not have


class Attention(nn.Module):
    num_key_value_groups, is_causal = 3, True


@pytest.mark.parametrize("kind", ["bool", "float", "one for all rows", "none"])
def test_it_is_the_attention_of_transformers(kind):
    generator = torch.Generator().manual_seed(0)
    B, heads, L, S, D = 2, 2, 5, 11, 4
    inputs = [torch.randn(shape, generator=generator, requires_grad=True)
              for shape in ((B, heads * 3, L, D), (B, heads, S, D), (B, heads, S, D + 2))]
    keep = torch.rand(B, 1, L, S, generator=generator) < 0.6
    keep[..., 0] = True
    mask = {"bool": keep, "float": torch.zeros(keep.shape).masked_fill(~keep, -1e9), "one for all rows": keep[:1],
            "none": None}[kind]
    found, expected = ([function(Attention(), *inputs, mask, scaling=0.7, is_causal=False)[0]]
                       for function in (grouped_sdpa, sdpa_attention.sdpa_attention_forward))
    for outputs in (found, expected):
        outputs += torch.autograd.grad(outputs[0].square().sum(), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_which_families_have_it(family, monkeypatch):
    """Nothing is repeated in a suffix pass; the prefix pass and the user's calls are as before."""
    lm = tiny_lm(family)
    before = lm.config._attn_implementation
    model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(num_heads=4), tiny_tokenizer())
    assert bool(model.engine.grouped.configs) == (family not in UNGROUPED | EAGER)
    expected = scores_and_gradients(model, "plain")
    seen, repeat = [], sdpa_attention.repeat_kv

    def repeated(states, groups):
        seen.append(lm.config.get_text_config()._attn_implementation)
        return repeat(states, groups)

    monkeypatch.setattr(sdpa_attention, "repeat_kv", repeated)
    assert_same(scores_and_gradients(model, "document_first"), expected)
    assert GROUPED not in seen and (SDPA in seen) == bool(model.engine.grouped.configs)  # the latter: prefix passes
    assert lm.config._attn_implementation == before


@pytest.mark.parametrize("fails", [False, True])
def test_an_attention_that_is_not_the_same_is_left_alone(fails, monkeypatch):
    def other(module, query, *args, **kwargs):
        if fails:
            raise TypeError("no such argument")
        return query.transpose(1, 2).contiguous(), None

    monkeypatch.setitem(AttentionInterface._global_mapping, GROUPED, other)
    lm = tiny_lm("llama")
    assert lm.config._attn_implementation == SDPA
    model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="none", generated_lora_rank=2), tiny_tokenizer())
    assert model.engine.grouped.configs == []


def test_an_error_gives_the_setting_back():
    model = qpeft.get_qpeft_model(tiny_lm("llama"), qpeft.QPeftConfig(num_heads=4), tiny_tokenizer())
    with pytest.raises(KeyError), model.engine.grouped.active():
        assert model.lm.config._attn_implementation == GROUPED
        raise KeyError
    assert model.lm.config._attn_implementation == SDPA
