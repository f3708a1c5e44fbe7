"""What is tried when an LM is taken: whether passes give its own numbers, and which module its decoder is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny import FAMILIES, PAIRS, draw_weights, own_scores, tiny_lm, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicSlidingWindowLayer

import qpeft_ext as qpeft
from qpeft_ext.engine.causal import CausalEngine
from qpeft_ext.lm.probe_ids import ordinary_ids

pytestmark = pytest.mark.slow

_BART = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
         "max_position_embeddings": 512, "is_decoder": True, "is_encoder_decoder": False, "pad_token_id": 0,
         "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
_LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
# decoders that take no positions and count the slots of a row; learned tables and sines
COUNT_SLOTS = {name: _BART for name in ("bart", "marian", "pegasus", "trocr")}
# get_decoder() is the head, or the LM
OTHER_DECODERS = {
    "modernbert-decoder": {**_LLAMA, "cls_token_id": 1, "sep_token_id": 1, "local_attention": 16},
    "llama4_text": {**_LLAMA, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size_mlp": 48,
                    "num_local_experts": 2, "attention_chunk_size": 16, "no_rope_layers": [1, 0]},
}  # fmt: skip


def model_of(lm) -> qpeft.QPeftModel:
    return qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="none"), tiny_tokenizer())


def causal_lm(model_type: str, settings: dict, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, vocab_size=260, **settings)
    lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    draw_weights(lm)
    return lm.eval()


def assert_own_scores(model, **options) -> None:
    expected = own_scores(model, PAIRS)
    assert expected.std() > 0.05
    for scores in (model.score(PAIRS, **options), model.score(PAIRS, path="plain", **options),
                   model.score(PAIRS, cache=qpeft.DocumentCache(), **options)):  # fmt: skip
        torch.testing.assert_close(scores.query_log_likelihood, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("model_type", COUNT_SLOTS)
def test_a_decoder_that_counts_slots_takes_the_plain_path(model_type):
    model = model_of(causal_lm(model_type, COUNT_SLOTS[model_type]))
    assert "in two parts otherwise than as a whole" in model.engine.why_not_cached and not model.engine.why_unpadded
    assert_own_scores(model)
    low = model_of(causal_lm(model_type, COUNT_SLOTS[model_type], torch.bfloat16))
    assert "in two parts otherwise than as a whole" in low.engine.why_not_cached


def test_a_window_of_the_cache_alone_is_found_in_short_prompts():
    """Moshi's cache drops what its masks still show, where a prompt is longer than the window."""
    settings = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_dim": 48, "head_dim": 8,
                "max_position_embeddings": 512, "sliding_window": 40, "num_key_value_heads": 4,
                "depth_decoder_config": {"num_hidden_layers": 1, "hidden_size": 32, "ffn_dim": 48},
                "audio_encoder_config": {"model_type": "mimi"}}  # fmt: skip
    model = model_of(causal_lm("moshi", settings))
    assert "in two parts" in model.engine.why_not_cached and model.lm.config.sliding_window == 40
    assert_own_scores(model)


@pytest.mark.parametrize("model_type", ["mistral", "gemma2"])
def test_padding_behind_a_window_that_is_no_number_is_not_read(model_type):
    """In float64 the masks of "eager" become infinite in its softmax: a token that sees nothing is NaN."""
    lm = tiny_lm(model_type, attn_implementation="eager").double()
    model = model_of(lm)
    assert "prompts of different lengths disturb each other" in model.engine.why_unpadded
    assert lm.config.sliding_window == 8
    expected = own_scores(model, PAIRS)
    for path in ("document_first", "plain"):
        found = model.score(PAIRS, path=path).query_log_likelihood.float()
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_chunks_of_the_cache_alone_are_found_in_short_prompts(monkeypatch):
    """A cache of a chunk that drops too much, where a prompt is longer than the chunk."""
    lm = causal_lm("llama4_text", OTHER_DECODERS["llama4_text"] | {"attention_chunk_size": 40})
    assert not model_of(lm).engine.why_not_cached
    update = DynamicSlidingWindowLayer.update

    def forget(layer, *given, **named):
        found = update(layer, *given, **named)
        if layer.keys.shape[-2] == layer.sliding_window - 1:
            layer.keys = layer.keys * 0
        return found

    monkeypatch.setattr(DynamicSlidingWindowLayer, "update", forget)
    model = model_of(lm)
    assert "in two parts" in model.engine.why_not_cached and lm.config.attention_chunk_size == 40
    assert_own_scores(model)


def test_an_lm_that_looks_for_its_tokens_in_the_table_is_refused():
    """Gemma 4 with embeddings per layer does, so that a vector of a trained clue would be none of them."""
    settings = {**_LLAMA, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8, "num_kv_shared_layers": 0,
                "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
    per_layer = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 260}
    with pytest.raises(ValueError, match="not give its own scores for embedded tokens .RuntimeError.* use another"):
        model_of(causal_lm("gemma4_text", settings | per_layer))
    model = model_of(causal_lm("gemma4_text", settings | {"hidden_size_per_layer_input": 0}))
    assert not model.engine.why_not_cached
    assert_own_scores(model)


@pytest.mark.parametrize("model_type", ["xlm", "prophetnet"])
def test_lms_whose_tokens_depend_on_those_behind_them_are_refused(model_type):
    """XLM sees all but its token 0, which is padding; ProphetNet's numbers depend on how many tokens there are."""
    settings = {
        "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 512, "pad_token_id": 0},
        "prophetnet": {"hidden_size": 32, "num_decoder_layers": 2, "num_decoder_attention_heads": 4,
                       "decoder_ffn_dim": 48, "is_decoder": True, "is_encoder_decoder": False, "pad_token_id": 259},
    }[model_type]  # fmt: skip
    with pytest.raises(ValueError, match="tokens see those behind them"):
        model_of(causal_lm(model_type, settings))


def test_prompts_that_sparse_attention_would_choose_from_are_refused():
    """Beyond its limit Doge's own scores depend on which of two equal tokens is taken."""
    settings = {**_LLAMA, "num_key_value_heads": 2, "keep_window_size": 128}
    model = model_of(causal_lm("doge", settings))
    expected = own_scores(model, PAIRS[:1])
    torch.testing.assert_close(model.score(PAIRS[:1]).query_log_likelihood, expected, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match=r"does not fit the LM's full attention \(keep_window_size\) of 128"):
        model.score([("boats", "sea " * 40)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_not_taken_for_a_difference(dtype):
    for family in FAMILIES:
        engine = model_of(tiny_lm(family, dtype=dtype)).engine
        assert not engine.why_not_cached and not engine.why_unpadded, family


@pytest.mark.parametrize("model_type", OTHER_DECODERS)
def test_the_decoder_is_the_module_whose_output_the_head_reads(model_type):
    model = model_of(causal_lm(model_type, OTHER_DECODERS[model_type]))
    assert model.engine.decoder is model.lm.model and not model.engine.why_not_cached
    assert_own_scores(model)


@pytest.mark.parametrize("model_type", OTHER_DECODERS)
def test_a_generated_lora_is_in_that_decoder(model_type):
    config = qpeft.QPeftConfig(clues="none", generated_lora_rank=2)
    lora = qpeft.get_qpeft_model(causal_lm(model_type, OTHER_DECODERS[model_type]), config, tiny_tokenizer())
    assert all(".layers." in f".{name}" for name in lora.generated_lora.names)
    for b in lora.generated_lora.b:
        torch.nn.init.normal_(b, std=0.1)
    plain = lora.score(PAIRS, path="plain").query_log_likelihood
    torch.testing.assert_close(lora.score(PAIRS).query_log_likelihood, plain, rtol=0, atol=2e-5)
    assert float((plain - own_scores(lora, PAIRS)).abs().max()) > 0.01


def test_an_lm_without_a_decoder_to_be_found_is_refused():
    lm = tiny_lm("llama")
    lm.forward = lambda input_ids, **kwargs: SimpleNamespace(logits=None)
    with pytest.raises(ValueError, match="no module of this llama LM gives the hidden states"):
        CausalEngine(lm)


def test_an_lm_that_fails_in_its_own_way_is_refused_in_one_line():
    lm = tiny_lm("llama")
    lm.model.register_forward_pre_hook(lambda *_: {}["task"])
    with pytest.raises(ValueError, match="^this llama LM cannot be used: KeyError: 'task'$"):
        model_of(lm)


def test_rows_that_disturb_each_other_are_read_one_by_one():
    """A row changes the results of its neighbours, as in a mixture of experts with a capacity."""
    lm = tiny_lm("llama")

    def mix(module, inputs, output):
        return output + 0.1 * output.mean(0, keepdim=True) - 0.1 * output

    lm.model.layers[0].mlp.register_forward_hook(mix)
    model = model_of(lm)
    assert "disturb each other" in model.engine.why_unpadded and model.engine.why_not_cached
    assert_own_scores(model)


def test_embeddings_that_are_not_read_as_ids_are_refused():
    lm = tiny_lm("llama")

    def add_something(module, inputs, named):
        return inputs, named if named.get("input_ids") is None else named | {
            "input_ids": None, "inputs_embeds": 1.5 * lm.get_input_embeddings()(named["input_ids"])}  # fmt: skip

    lm.model.register_forward_pre_hook(add_something, with_kwargs=True)
    with pytest.raises(ValueError, match="does not give its own scores for embedded tokens"):
        model_of(lm)


def test_the_prompts_that_are_tried_hold_no_token_with_a_meaning():
    lm = tiny_lm("llama")
    lm.config.pad_token_id = lm.config.image_token_id = 20
    lm.config.eos_token_id = [21, 22]
    ids = ordinary_ids(lm, 25)
    assert len(set(ids)) == 25 and not {0, 20, 21, 22} & set(ids) and max(ids) < 260
