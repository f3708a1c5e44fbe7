"""Small configurations of every model type of transformers, made from the defaults of its config class."""

from __future__ import annotations

import inspect
import math

from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 260

# endings of names -> values; the first that fits counts. Widths: 4 heads of 8 make 32.
_SIZES: list[tuple[tuple[str, ...], int]] = [
    (("vocab_size", "n_vocab", "vocab_size_per_layer_input", "text_vocab_size"), VOCABULARY),
    (("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    (("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "head_dim", "index_head_dim", "global_head_dim", "d_kv",
      "key_head_dim", "value_head_dim", "attention_head_dim", "kv_channels"), 8),
    (("num_key_value_heads", "num_kv_heads", "n_head_kv", "num_global_key_value_heads", "num_query_groups"), 2),
    (("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
      "index_n_heads", "num_ngpt_heads", "num_encoder_attention_heads", "num_decoder_attention_heads",
      "linear_num_key_heads", "linear_num_value_heads", "attention_heads"), 4),
    (("num_hidden_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_layers",
      "num_decoder_layers", "num_encoder_layers", "num_blocks", "mtp_num_layers"), 2),
    (("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim",
      "ffn_config.ffn_hidden_size", "intermediate_size_mlp", "dff", "feed_forward_size", "linear_size"), 48),
    (("hidden_size", "d_model", "n_embd", "emb_dim", "dim", "embed_dim", "projection_dim", "word_embed_proj_dim",
      "lru_width", "embedding_size", "width", "cross_attention_dim"), 32),
    (("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    (("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "top_k_experts", "moe_k"), 2),
    (("n_shared_experts", "num_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    (("sliding_window", "attention_window_size", "local_attention", "window_size", "sliding_window_size",
      "attention_chunk_size"), 16),
    (("state_size", "mamba_d_state", "ssm_state_size", "mamba_state_size", "d_state"), 8),
    (("hidden_size_per_layer_input",), 8),
    (("image_size",), 16),
    (("patch_size",), 8),
    (("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions", "n_ctx",
      "max_sequence_length", "seq_length"), 512),
]  # fmt: skip
# a padding id that no text has: some LMs read every token with this id as padding
_LAST = {"pad_token_id": VOCABULARY - 1, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 1,
         "cls_token_id": 0, "sep_token_id": 1, "mask_token_id": 1, "unk_token_id": 1}  # fmt: skip

# what the rules above do not know of a type: settings, by dotted place
_GEMMA4 = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_kv_shared_layers": 0,
}
SPECIAL: dict[str, dict] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 16,
                         "mamba_expand": 2},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "zamba": {"num_hidden_layers": 2, "layer_types": ["mamba", "hybrid"]},
    "zamba2": {"num_hidden_layers": 2, "layer_types": ["mamba", "hybrid"], "num_mem_blocks": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 1},
    "nemotron_h": {"n_groups": 1, "mamba_num_heads": 4, "mamba_head_dim": 16, "expand": 2},
    "codegen": {"rotary_dim": 8}, "gptj": {"rotary_dim": 8},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n_text": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
                     "num_kv_shared_layers": 2, "altup_num_inputs": 2, "laurel_rank": 8,
                     "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [48] * 4},
    "gemma4_text": _GEMMA4, "gemma4_unified_text": _GEMMA4,
    "gemma4": {f"text_config.{name}": value for name, value in _GEMMA4.items()},
    "gemma4_unified": {f"text_config.{name}": value for name, value in _GEMMA4.items()},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "nemotron": {"num_key_value_heads": 2},
    "minicpm3": {"qk_rope_head_dim": 8},
    "longcat_flash": {"qk_head_dim": 16},
    "cohere_compass_text": {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4}
                                                for kind in ("full_attention", "sliding_attention")}},
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh"],
                 "attention_head_size": 8, "num_hashes": 1, "num_buckets": 4},
    "doge": {"keep_window_size": 512},
    "falcon": {"head_dim": "default"},
}  # fmt: skip


def small_config(model_type: str):
    """A config whose LM has some thousand to some million parameters."""
    return _small(CONFIG_MAPPING[model_type], SPECIAL.get(model_type, {}))


def _small(config_class, special: dict):
    settings, accepted = {}, inspect.signature(config_class.__init__).parameters
    defaults = _defaults(config_class)
    subs = getattr(config_class, "sub_configs", {}) or {}
    for name, sub_class in subs.items():
        own = {key.removeprefix(f"{name}."): value for key, value in special.items() if key.startswith(f"{name}.")}
        if sub_class is AutoConfig:
            kind = own.pop("model_type", None) or getattr(getattr(defaults, name, None), "model_type", None)
            sub_class = CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING else None
        if sub_class is not None and name in accepted:
            settings[name] = _small(sub_class, own)
    layers = next((value for names, value in _SIZES if "num_hidden_layers" in names), 2)
    for name in accepted:
        if name in subs or name in ("self", "kwargs", "args"):
            continue
        try:
            value = getattr(defaults, name, None) if defaults is not None else accepted[name].default
        except Exception:  # noqa: BLE001 - differs between layers
            continue
        small = _value(name, value)
        if small is not None:
            settings[name] = small
    for name in ("num_key_value_heads", "num_kv_heads"):  # as many as heads where the type has no groups
        heads = getattr(defaults, "num_attention_heads", None)
        if name in settings and isinstance(heads, int) and getattr(defaults, name, None) == heads:
            settings[name] = 4
    kinds = getattr(defaults, "layer_types", None) if defaults is not None else None
    if isinstance(kinds, (list, tuple)) and kinds and "layer_types" in accepted:
        distinct = list(dict.fromkeys(kinds))
        layers = max(layers, len(distinct))
        settings["layer_types"] = distinct * (layers // len(distinct)) + distinct[: layers % len(distinct)]
        settings["num_hidden_layers"] = layers
    settings |= {name: value for name, value in special.items() if "." not in name}
    settings = {name: value for name, value in settings.items() if value != "default"}
    return config_class(**settings)


def _defaults(config_class):
    try:
        config = config_class()
        config.allow_global_per_layer_attribute_access = True
        return config
    except Exception:  # noqa: BLE001 - some cannot be built without settings
        return None


def _value(name: str, value):
    """The small value of a setting; None: its default."""
    if name in _LAST:
        return _LAST[name]
    if name.endswith(("_token_id", "_token_index", "_token_ids")) and isinstance(value, int):
        return VOCABULARY - 2
    if isinstance(value, bool) or not isinstance(value, int) and not (value is None and name in ("head_dim",)):
        return None
    for names, small in _SIZES:
        if name in names or any(name.endswith(f"_{ending}") for ending in names):
            return small if value is None else min(small, value) if value > 0 else None
    return None if not isinstance(value, int) or value < 5000 or math.log10(max(1, value)) > 5 else None
