"""Tiny random models, one per architecture, and a tiny byte-level tokenizer without a pad token."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 260
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_WINDOWED = {"sliding_window": 8}  # shorter than most prefixes of the tests
_MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "bos_token_id": 0, "eos_token_id": 1}

# model_type, overrides of _COMMON (None: not a _COMMON model)
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", _WINDOWED),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, **_WINDOWED}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, **_WINDOWED, **_MIXED}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8, **_WINDOWED}),
    "gemma3": ("gemma3_text", {"query_pre_attn_scalar": 8, **_WINDOWED, **_MIXED}),
    "phi3": ("phi3", {"eos_token_id": 1, **_WINDOWED}),
    "gpt2": ("gpt2", _GPT2),
    "gpt_neox": ("gpt_neox", {}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "granite": ("granite", {"logits_scaling": 4.0}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": True}),
}

# Recurrent state: the cache cannot be shared.
PLAIN_ONLY: dict[str, tuple[str, dict]] = {
    "mamba": ("mamba", {"state_size": 8}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
}


def tiny_lm(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **more):
    """A random LM whose attention matters: weights of N(0, 0.25), so that the document moves the score.

    more: settings of its config, instead of those of the family.
    """
    model_type, overrides = (FAMILIES | PLAIN_ONLY)[family]
    overrides = overrides | more
    settings = {"vocab_size": VOCABULARY, **overrides} if model_type == "gpt2" else {**_COMMON, **overrides}
    config = AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
            elif "bias" in name:
                parameter.normal_(0, 0.05)
    return lm.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, plus <s> and </s>; no pad token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {letter: i + 2 for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


# Ragged: five to forty tokens, one empty; documents and queries shared between the pairs.
DOCUMENTS = [
    "tides rise",
    {"title": "Moon", "text": "pulls the sea twice a day"},
    "",
    "a long passage about harbours and their boats",
]
QUERIES = ["why tides?", "boats"]
PAIRS = [(QUERIES[q], DOCUMENTS[d]) for q, d in [(0, 0), (1, 3), (0, 1), (1, 0), (0, 3), (1, 2), (0, 2)]]
