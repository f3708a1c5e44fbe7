"""LMs that multiply in 8 bits (``dtype="int8"``): what is rounded, what is not, and all that is done with an LM."""

import copy
import json
import logging
import shutil

import pytest
import torch
from lm.test_packed import ADAPTER, kendall, pairs, scores_of  # noqa: F401  (pairs is a fixture)
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

import qpeft_ext as qpeft
from qpeft_ext.lm import int8
from qpeft_ext.lm.int8 import Int8Linear, is_int8
from qpeft_ext.lm.loading import BASE_LM
from qpeft_ext.lm.packed import count
from qpeft_ext.lm.passes import hooked
from qpeft_ext.lm.state import LMState, fingerprint_of
from qpeft_ext.ops.int8_linear import reference


@pytest.fixture
def lm():
    return qpeft.load_lm(BASE_LM, dtype="int8")


def layers_of(lm) -> list[Int8Linear]:
    return [module for module in lm.modules() if isinstance(module, Int8Linear)]


def test_linear_layers_are_rounded_and_nothing_else(lm):
    own = qpeft.load_lm(BASE_LM, dtype="float32")
    assert is_int8(lm) and not is_int8(own) and lm.dtype == torch.float32 and not lm.training
    assert len(layers_of(lm)) == 7 * len(lm.model.layers)
    for name, module in own.named_modules():
        other = lm.get_submodule(name)
        if isinstance(other, Int8Linear):
            assert (other.layer.dequantized() - module.weight).norm() < 0.01 * module.weight.norm()
            assert len(set(other.columns.tolist())) == 4
        else:
            for parameter, same in zip(module.parameters(False), other.parameters(False), strict=True):
                assert torch.equal(parameter, same) and same.dtype == torch.float32
    assert lm.lm_head.weight is lm.model.embed_tokens.weight
    assert sum(map(count, lm.parameters())) == sum(p.numel() for p in own.parameters())
    bytes_of = [sum(layer.weight.nbytes for layer in layers_of(model)) for model in (lm,)]
    assert bytes_of[0] * 4 == sum(
        own.get_submodule(n).weight.nbytes for n, m in lm.named_modules() if m in layers_of(lm)
    )


def test_each_layer_gives_the_sum_of_integers(lm):
    seen = []

    def compare(module, given, output):
        x = given[0].flatten(0, -2)
        expected = reference(x, module.layer, module.bias)
        seen.append(float((output.flatten(0, -2) - expected).norm() / expected.norm()))

    ids = torch.arange(40)[None] * 17
    with torch.no_grad(), hooked(after=[(layer, compare) for layer in layers_of(lm)]):
        lm(input_ids=ids)
    assert len(seen) == len(layers_of(lm)) and max(seen) < 2e-3


def test_ranks_agree_with_those_in_float32(pairs):  # noqa: F811
    own, model = (
        qpeft.QPeftModel.from_pretrained(ADAPTER, BASE_LM, dtype=dtype, device="cpu") for dtype in ("float32", "int8")
    )
    scores, rounded = scores_of(own, pairs), scores_of(model, pairs)
    taus = [kendall(a, b) for a, b in zip(scores, rounded, strict=True)]
    print(f"int8: Kendall's τ with float32 {sum(taus) / len(taus):.3f} for each query, "
          f"{kendall(scores.flatten(), rounded.flatten()):.3f} of all pairs")  # fmt: skip
    assert sum(taus) / len(taus) >= 0.95 and not torch.equal(scores, rounded)
    assert model.engine.head.fused and not model.engine.why_not_cached and not model.engine.why_unpadded


def test_alone_and_deterministic_a_score_has_the_same_bits(lm):
    model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="none"))
    reranker = qpeft.Reranker(model, deterministic=True)
    some = [("the mean of a list", text) for text in ("def mean(x): return sum(x) / len(x)", "a boat", "sort " * 40)]
    together = reranker.predict(some)
    assert [float(reranker.predict([pair])[0]) for pair in some] == together.tolist()
    in_a_batch = qpeft.Reranker(model).predict(some)  # float32 parts differ by what else is there, and rounding after
    assert abs(in_a_batch - together).max() < 0.2


def test_adapters_learn_through_it(lm, pairs):  # noqa: F811
    """A generated LoRA and a soft prompt, whose gradients go through layers in suffixes and in prefixes."""
    model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig.recommended(rank=8))
    assert len(model.generated_lora.names) == len(layers_of(lm))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    some = [(pairs[0][0], pairs[1][0])]
    before = model.score(some).query_log_likelihood
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        (-model(model.encode(some)).query_log_likelihood.sum()).backward()
        optimizer.step()
    model.eval()
    assert model.score(some).query_log_likelihood > before
    assert not any(p.grad is not None for p in lm.parameters())


def test_the_gradient_is_that_of_the_float_weights(lm):
    own = copy.deepcopy(lm)
    for name, module in list(own.named_modules()):
        if isinstance(module, Int8Linear):
            plain = nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight = nn.Parameter(module.layer.dequantized(), requires_grad=False)
            own.set_submodule(name, plain)
    embeds = lm.model.embed_tokens(torch.arange(24)[None] * 31).detach().requires_grad_()
    found, expected = (
        torch.autograd.grad(model(inputs_embeds=embeds).logits[0, -1].log_softmax(-1)[7], embeds)[0]
        for model in (lm, own)
    )
    assert (found - expected).norm() < 0.1 * expected.norm()  # the same but for what 8 bits of activations change
    assert found.isfinite().all()


@pytest.mark.slow
def test_a_lora_of_peft_is_scored(lm, pairs):  # noqa: F811
    peft = pytest.importorskip("peft", reason="LoRA in the LM needs the package peft")
    config, some = qpeft.QPeftConfig(clues="none"), [(pairs[0][0], pairs[1][0])]
    plain = qpeft.get_qpeft_model(lm, config).score(some).query_log_likelihood
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = qpeft.get_qpeft_model(peft.get_peft_model(lm, lora), config)
    assert abs(model.score(some).query_log_likelihood - plain) > 1e-3
    assert fingerprint_of(model.lm)["adapter"]


def test_an_index_of_int8_is_read_by_int8_only(tmp_path):
    from qpeft_ext.cli import main

    texts = ("a moon", "the tide of the sea", "a boat")
    lines = [json.dumps({"_id": f"d{i}", "text": text}) for i, text in enumerate(texts)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    index = ["index", str(tmp_path / "corpus.jsonl"), "--out", str(tmp_path / "index"), "--device", "cpu"]
    assert main([*index, "--base-model", str(BASE_LM), "--dtype", "int8"]) == 0
    for dtype, words in (("int8", ""), ("float32", "the LM in int8, this one is in float32; say --dtype int8")):
        model = qpeft.get_qpeft_model(qpeft.load_lm(BASE_LM, dtype=dtype), qpeft.QPeftConfig(clues="none"))
        reranker = qpeft.Reranker(model, cache=qpeft.DocumentCache(index=tmp_path / "index"))
        if words:
            with pytest.raises(ValueError, match=words):
                reranker.rank("why tides", texts)
        else:
            reranker.rank("why tides", texts)
            assert reranker.cache.tiers["index"].hits == 3


@torch.no_grad()
def test_versions_and_fingerprints(lm):
    again, own = qpeft.load_lm(BASE_LM, dtype=torch.int8), qpeft.load_lm(BASE_LM, dtype="float32")
    assert fingerprint_of(lm) == fingerprint_of(again) and fingerprint_of(lm)["dtype"] == "int8"
    assert fingerprint_of(own)["dtype"] == "float32" and fingerprint_of(own)["weights"] != fingerprint_of(lm)["weights"]
    before = LMState.of(lm).version()
    layers_of(lm)[0].weight.view(-1)[:1] += 1
    assert LMState.of(lm).version() is not before


def test_another_dtype_leaves_scales_as_they_are(lm):
    scales = [layer.scale.clone() for layer in layers_of(lm)]
    lm.to(torch.bfloat16)
    assert all(map(torch.equal, scales, (layer.scale for layer in layers_of(lm))))
    assert lm(input_ids=torch.arange(5)[None]).logits.dtype == torch.bfloat16


def test_biases_and_layers_that_do_not_fit():
    sizes = {"vocab_size": 50, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen2Config(**sizes, hidden_size=128, intermediate_size=200)  # its query, key and value have biases
    lm = Qwen2ForCausalLM(config).eval()
    for name, parameter in lm.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    own = copy.deepcopy(lm)
    int8.to_int8(lm)
    names = {name.rpartition(".")[2] for name, module in lm.named_modules() if isinstance(module, Int8Linear)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj"}  # 200 is no multiple of 16 or 64
    layer, plain = (model.model.layers[0].self_attn.q_proj for model in (lm, own))
    x = torch.randn(3, 128)
    assert (layer(x) - plain(x)).norm() < 0.02 * plain(x).norm() and torch.equal(layer.bias, plain.bias)
    assert layer(x[0]).shape == (128,) and layer(x[None, None]).shape == (1, 1, 3, 128)
    small = Qwen2Config(**sizes, hidden_size=32, intermediate_size=64)
    with pytest.raises(ValueError, match="dtype='int8': no layer of this qwen2 LM can compute in 8 bits"):
        int8.to_int8(Qwen2ForCausalLM(small))


@torch.no_grad()
def test_large_inputs_are_not_rounded():
    """A residual stream in which one number is much larger than the others, as most LMs have."""
    own = qpeft.load_lm(BASE_LM, dtype="float32")
    own.model.embed_tokens.weight[:, 77] = 40.0
    own.model.norm.weight[77] = 0
    for layer in own.model.layers:
        layer.mlp.down_proj.weight[77] = 0
        layer.self_attn.o_proj.weight[77] = 0
    lm, ids = copy.deepcopy(own), torch.arange(40)[None] * 17
    int8.to_int8(lm)
    assert all(77 in layer.self_attn.q_proj.columns for layer in lm.model.layers)
    hidden, rounded = (model(input_ids=ids, output_hidden_states=True).hidden_states[-1] for model in (own, lm))
    assert (hidden - rounded).norm() < 0.03 * hidden.norm()


def test_what_is_not_possible_is_said_in_one_line(lm, tmp_path):
    for device, options, words in (
        ("cuda", {}, "dtype='int8' is for CPUs, got cuda"),
        (None, {"device_map": "auto"}, "dtype='int8' is for CPUs, got device_map='auto'"),
        (None, {"quantization_config": {"quant_method": "torchao"}}, "give it or a quantization_config, not both"),
    ):
        with pytest.raises(ValueError, match=words):
            qpeft.load_lm(BASE_LM, dtype="int8", device=device, **options)
    with pytest.raises(ValueError, match="train_lm=True trains every weight, but .* is packed"):
        qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="none", train_lm=True))
    model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="none", generated_lora_rank=2))
    with pytest.raises(ValueError, match="merge_for: nothing can be added to .*q_proj, whose weight is packed"):
        model.merge_for("a query")
    lm.save_pretrained(tmp_path / "lm")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE_LM / name, tmp_path / "lm")
    with pytest.raises(ValueError, match="cannot load the base LM"):
        qpeft.load_lm(tmp_path / "lm")


def test_a_slow_machine_is_told_once(monkeypatch, caplog):
    monkeypatch.setattr(int8, "has_int8_products", lambda: False)
    int8._say_slow.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            qpeft.load_lm(BASE_LM, dtype="int8")
    assert [record.message for record in caplog.records if "int8" in record.message] == [
        "dtype='int8': this processor has no AVX512-VNNI, so that int8 is slower here than float32"
    ]
