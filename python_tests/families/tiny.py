"""Tiny random models, one per architecture, and a tiny byte-level tokenizer without a pad token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

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

_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "scale_embedding": True,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 259,
    "decoder_start_token_id": 1,
}

# T5 scales its decoder's output, FLAN-T5 has a head of its own; BART a bias; Pegasus scales embeddings in its encoder.
ENCODER_DECODERS: dict[str, tuple[str, dict]] = {
    "t5": ("t5", {**_T5, "feed_forward_proj": "relu"}),
    "flan_t5": ("t5", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bart": ("bart", _BART),
    "pegasus": ("pegasus", _BART),
}


def tiny_lm(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **more):
    """A random LM whose attention matters: weights of N(0, 0.25), so that the document moves the score.

    more: settings of its config, instead of those of the family.
    """
    model_type, overrides = (FAMILIES | PLAIN_ONLY | ENCODER_DECODERS)[family]
    overrides = overrides | more
    alone = model_type == "gpt2" or family in ENCODER_DECODERS
    settings = {"vocab_size": VOCABULARY, **overrides} if alone else {**_COMMON, **overrides}
    config = AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(seed)
    auto = AutoModelForSeq2SeqLM if family in ENCODER_DECODERS else AutoModelForCausalLM
    lm = auto.from_config(config, dtype=dtype)
    draw_weights(lm, family)
    return lm.eval()


def draw_weights(lm: torch.nn.Module, family: str = "") -> None:
    if family == "flan_t5":  # transformers ties the heads of all T5s that are not loaded
        lm.lm_head.weight = torch.nn.Parameter(torch.empty_like(lm.lm_head.weight))

    def draw(weights: torch.Tensor, spread: float) -> None:  # in float32, so that all dtypes have the same weights
        weights.copy_(torch.empty(weights.shape).normal_(0, spread))

    with torch.no_grad():
        if hasattr(lm, "final_logits_bias"):
            draw(lm.final_logits_bias, 0.25)
        for name, parameter in lm.named_parameters():
            if parameter.dim() > 1:
                # the logits of the first T5 are scaled down by the square root of the width
                draw(parameter, 1 if family == "t5" and name == "shared.weight" else 0.25)
            elif "bias" in name:
                draw(parameter, 0.05)


@torch.no_grad()
def own_scores(model, pairs: Sequence[tuple]) -> torch.Tensor:
    """What the causal LM itself says, [pairs]: one unpadded forward of each whole prompt, from ids, without clues."""
    scores = []
    for query, document in pairs:
        prefix, target = model.prompt.documents([document])[0].ids, model.prompt.queries([query])[0]
        ids = torch.tensor([[*prefix, *model.prompt.suffix.bare_question, *target]])
        log_p = model.lm(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
        scores.append(sum(log_p[-len(target) - 1 + i, token] for i, token in enumerate(target)))
    return torch.stack(scores)


def tiny_tokenizer(around: str = "<s> $A") -> PreTrainedTokenizerFast:
    """One token per byte, plus <s> and </s>; no pad token. ``around``: "$A </s>" ends every text as that of T5 does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {letter: i + 2 for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(around, special_tokens=[("<s>", 0), ("</s>", 1)])
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
