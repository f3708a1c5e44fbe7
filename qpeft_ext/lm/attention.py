"""Attention of an LM's layers, where it can be faster than transformers' "sdpa" in our passes.

* bfloat16 on a CPU with AMX: `ops.bfloat16_attention`, in all passes.
* float32 on a CPU with AVX-512: `ops.causal_attention`, in passes without gradient.
* Several query heads share one head of keys and values (grouped-query attention): with a mask, transformers' "sdpa"
  copies the keys and values of every pair for each head of a group first. torch's kernel for CPUs reads them where they
  are; in a prefix pass it reads documents one by one, without padding, which needs no mask. On other devices, in suffix
  passes, the queries of a group are rows of one head instead: a suffix has 40 rows, a prefix some hundred. transformers
  does the same where there is one query token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from threading import local
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..ops.bfloat16_attention import bfloat16_attention, is_supported
from ..ops.causal_attention import causal_attention, is_faster
from .masks import KnownMasks

SDPA, OURS = "sdpa", "qpeft_sdpa"  # names of attention implementations


class _ThisThread(local):
    """passes: how many passes with our attention this thread is in. The config says `OURS` in all threads meanwhile.

    masks: those of its pass.
    """

    passes = 0

    def __init__(self) -> None:
        self.masks = KnownMasks()


this_thread = _ThisThread()


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """An attention function of transformers. Calls with anything that it does not know go to "sdpa".

    Args:
        query: [B, H, L, D].
        key, value: [B, H / groups, S, D].
        attention_mask: [B or 1, 1, L, S], bool or added to the scores.
    Returns: [B, L, H, D of a value], and None instead of the weights.
    """
    B, H, L, D = query.shape
    heads = key.shape[1]
    unknown = any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "s_aux"))
    if unknown or not in_pass() or attention_mask is None or attention_mask.shape[1] != 1 or H % heads:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if not dropout and is_supported(query, key, value, attention_mask):
        return bfloat16_attention(query, key, value, attention_mask, D**-0.5 if scaling is None else scaling), None
    if not dropout and not torch.compiler.is_compiling() and is_faster(query, key, value):
        starts = this_thread.masks.of(attention_mask).starts_of(B)
        if starts is not None:
            return causal_attention(query, key, value, starts, D**-0.5 if scaling is None else scaling), None
    if H == heads:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if query.device.type == "cpu":
        return _on_cpu(query, key, value, attention_mask, dropout, scaling), None
    groups = H // heads
    found = nn.functional.scaled_dot_product_attention(
        query.reshape(B, heads, groups * L, D), key, value, attn_mask=attention_mask.repeat(1, 1, groups, 1),
        dropout_p=dropout, scale=scaling)  # fmt: skip
    return found.reshape(B, H, L, -1).transpose(1, 2).contiguous(), None


def _on_cpu(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float, scaling: float | None) -> Tensor:
    """Attention of heads that share keys and values, [B, L, H, D of a value]; arguments as for `attention`."""
    sdpa = partial(nn.functional.scaled_dot_product_attention, scale=scaling, enable_gqa=True)
    if torch.compiler.is_compiling():
        found = sdpa(query, key, value, attn_mask=mask, dropout_p=dropout)
        return found.transpose(1, 2).contiguous()
    known = this_thread.masks.of(mask)
    with_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    B, H, L, _ = query.shape
    starts = known.starts_of(B)
    if starts is None or L < key.shape[2] or dropout or with_grad:
        found = sdpa(query, key, value, attn_mask=known.added(query.dtype), dropout_p=dropout)
        return found.transpose(1, 2).contiguous()
    out = query.new_zeros(B, L, H, value.shape[-1])
    for b, start in enumerate(starts):
        q, k, v = (x[b : b + 1, :, start:] for x in (query, key, value))
        out[b, start:] = sdpa(q, k, v, is_causal=True)[0].transpose(0, 1)
    return out


def _mask(*args, **kwargs) -> Tensor | None:
    """The mask of "sdpa". In a pass it is never left out: our attention needs one even where sdpa would not."""
    return sdpa_mask(*args, **kwargs | ({"allow_is_causal_skip": False} if in_pass() else {}))


def in_pass() -> bool:
    """Is this thread in a pass with faster forms?"""
    return torch.compiler.is_compiling() or this_thread.passes > 0


AttentionInterface.register(OURS, attention)
AttentionMaskInterface.register(OURS, _mask)


def configs_worth_ours(lm: nn.Module, decoder: nn.Module) -> Sequence[PreTrainedConfig]:
    """The configs of ``decoder`` and its attention layers, if their attention is "sdpa" and ours may be faster."""
    everywhere = _has_kernel(decoder)
    layers = [
        module
        for module in decoder.modules()
        if _sdpa_config(module) is not None
        and hasattr(module, "is_causal")
        and (everywhere or getattr(module, "num_key_value_groups", 1) > 1)
    ]
    if not layers or not getattr(lm, "_supports_attention_backend", False):
        return ()
    configs = [_sdpa_config(module) for module in (decoder, *layers)]
    if configs[0] is None:
        return ()
    return list({id(config): config for config in configs if config is not None}.values())


def is_faster_in_prefixes(decoder: nn.Module) -> bool:
    """Is our attention faster in passes over prefixes too? It is on CPUs."""
    return next(decoder.parameters()).device.type == "cpu"


def _has_kernel(decoder: nn.Module) -> bool:
    """Is there a kernel of ours for this decoder's dtype, which is faster also where each head has its own keys?"""
    weight = next(decoder.parameters())
    own, wide = (weight.new_empty(1, 1, 1, width) for width in (_head_width(decoder), 32))
    return is_faster(own, own, own) or is_supported(wide, wide, wide, torch.ones(1, 1, 1, 1, dtype=torch.bool))


def _head_width(decoder: nn.Module) -> int:
    """Numbers in a key, as the config says; 1 where it does not."""
    config: Any = getattr(decoder, "config", None)
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    whole = width // heads if isinstance(heads, int) and isinstance(width, int) and heads else 1
    return getattr(config, "head_dim", None) or whole


def _sdpa_config(module: nn.Module) -> PreTrainedConfig | None:
    config = getattr(module, "config", None)
    return config if getattr(config, "_attn_implementation", None) == SDPA else None
