"""After the last attention only the rows that the head reads are computed."""

from __future__ import annotations

import pytest
import torch
from test_families import assert_same, scores_and_gradients
from tiny import FAMILIES, PAIRS, tiny_lm, tiny_tokenizer

import qpeft_ext as qpeft
from qpeft_ext.engine.causal import CausalEngine
from qpeft_ext.engine.filling import CacheFilling

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_leaves_out_the_rows_that_nobody_reads(family):
    model = qpeft.get_qpeft_model(tiny_lm(family), qpeft.QPeftConfig(num_heads=4), tiny_tokenizer())
    modules = model.engine.lm_passes.row_wise
    assert len(modules) >= (1 if family == "bloom" else 2)  # its feed-forward takes the residual too
    computed = {module: 0 for module in modules}

    def count(module, inputs, output):
        if module._forward_pre_hooks:  # not in the prefix pass, which runs every row of the query projection
            computed[module] += inputs[0].shape[:-1].numel()

    handles = [module.register_forward_hook(count, prepend=True) for module in modules]
    model.score(PAIRS)
    for handle in handles:
        handle.remove()
    tokens = sum(len(query) for query in model.prompt.queries([query for query, _ in PAIRS]))
    assert set(computed.values()) == {tokens}
    together = family in ("gpt2", "gpt_neox", "bloom", "phi3")  # queries, keys and values by one projection
    assert together != any(name.endswith("q_proj") and module in modules for name, module in model.lm.named_modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in modules)


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_that_are_filled_up_change_nothing(family, monkeypatch):
    """Suffixes of multiples of 8 slots, as for a bf16 LM on a CPU."""
    model = qpeft.get_qpeft_model(tiny_lm(family), qpeft.QPeftConfig(num_heads=4), tiny_tokenizer())
    expected = scores_and_gradients(model, "plain")
    widths, decoder = [], model.engine.decoder
    handle = decoder.register_forward_pre_hook(
        lambda _, __, named: widths.append(named["inputs_embeds"].shape[1]), with_kwargs=True
    )
    for place in ("engine.causal", "engine.schedule", "lm.row_wise"):
        monkeypatch.setattr(f"qpeft_ext.{place}.shape_step", lambda *_: 8)
    with torch.no_grad():
        batch = model.encode(PAIRS)
        cache = qpeft.DocumentCache(1 << 20)
        with model.passes():
            assert CacheFilling(model.engine, cache, False).fill(batch, 2048)
        widths.clear()
        model(batch, cache=cache, prefilled=True)
    assert widths and all(width % 8 == 0 for width in widths)
    handle.remove()
    assert_same(scores_and_gradients(model, "document_first"), expected)


class MixesRows(torch.nn.Module):
    """A feed-forward that looks at the other tokens as well."""

    def __init__(self, inner) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x + x.mean(1, keepdim=True))


def test_a_module_that_mixes_rows_is_noticed():
    lm = tiny_lm("llama")
    lm.model.layers[-1].mlp = MixesRows(lm.model.layers[-1].mlp)
    assert not CausalEngine(lm).lm_passes.row_wise


def test_an_update_that_tells_rows_apart_keeps_all_of_them():
    config = qpeft.QPeftConfig(clues="none", generated_lora_rank=4, target_modules=("down_proj", "o_proj"))
    model = qpeft.get_qpeft_model(tiny_lm("llama"), config, tiny_tokenizer())
    attention, feed_forward = model.lm.model.layers[-1].self_attn, model.lm.model.layers[-1].mlp
    assert {attention.q_proj, attention.o_proj, feed_forward} <= set(model.engine.lm_passes.row_wise)
    seen = []

    def note(module, inputs):
        if model.lm.model.layers[-1].mlp.down_proj._forward_hooks:  # a suffix pass
            seen.append(
                {part for part in (attention.q_proj, attention.o_proj, feed_forward) if part._forward_pre_hooks}
            )

    handle = model.lm.model.layers[0].mlp.register_forward_pre_hook(note)
    model.score(PAIRS)
    handle.remove()
    assert seen and all(picked == {attention.q_proj} for picked in seen)
    with torch.no_grad():
        for b in model.generated_lora.b:
            b.normal_(0, 0.1)
    assert_same(scores_and_gradients(model, "document_first"), scores_and_gradients(model, "plain"))
