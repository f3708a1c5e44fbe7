"""Attention of suffixes where several query heads share one head of keys and values (grouped-query attention).

With a mask, transformers' "sdpa" copies the keys and values of every pair for each head of a group first. Here the
queries of a group are rows of one head instead, so that nothing is copied: a suffix has 40 rows, a prefix some hundred.
transformers does the same where there is one query token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SDPA, GROUPED = "sdpa", "qpeft_grouped_sdpa"  # names of attention implementations


def grouped_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention function for heads in groups; what it does not know goes to "sdpa".

    query [B, H, L, D], key and value [B, H / groups, S, D], attention_mask [B or 1, 1, L, S].
    Returns: [B, L, H, D of a value].
    """
    B, H, L, D = query.shape
    heads = key.shape[1]
    known = attention_mask is not None and attention_mask.shape[1] == 1 and H > heads and H % heads == 0
    if not known or any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "s_aux")):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    groups = H // heads
    found = nn.functional.scaled_dot_product_attention(
        query.reshape(B, heads, groups * L, D), key, value, attn_mask=attention_mask.repeat(1, 1, groups, 1),
        dropout_p=dropout, scale=scaling)  # fmt: skip
    return found.reshape(B, H, L, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_sdpa)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


class GroupedAttention:
    """The configs of an LM whose attention becomes grouped while `active` is entered; none: nothing happens."""

    def __init__(self, configs: Sequence = ()) -> None:
        self.configs = list(configs)

    @contextmanager
    def active(self) -> Iterator[None]:
        changed = [config for config in self.configs if config._attn_implementation == SDPA]
        try:
            for config in changed:
                config._attn_implementation = GROUPED
            yield
        finally:
            for config in changed:
                config._attn_implementation = SDPA


def find_grouped(lm: nn.Module, decoder: nn.Module, run: Callable[[Tensor], Tensor]) -> GroupedAttention:
    """`GroupedAttention` of an LM whose attention is "sdpa", in groups, and the same when it is computed so.

    run: attention mask [1, 3] -> final hidden states [1, 3, D] of three tokens.
    """
    def has_sdpa(module: nn.Module) -> bool:
        return getattr(getattr(module, "config", None), "_attn_implementation", None) == SDPA

    grouped = [m for m in decoder.modules() if getattr(m, "num_key_value_groups", 1) > 1 and has_sdpa(m)]
    if not grouped or not has_sdpa(decoder) or not getattr(lm, "_supports_attention_backend", False):
        return GroupedAttention()
    found = GroupedAttention({id(m.config): m.config for m in (decoder, *grouped)}.values())
    mask = torch.tensor([[0, 1, 1]], device=next(decoder.parameters()).device)
    expected = run(mask)[0, 1:]
    try:
        with found.active():
            got = run(mask)[0, 1:]
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError):  # it calls its attention in its own way
        return GroupedAttention()
    error, size = (got - expected).float().abs().max(), expected.float().abs().max()
    return found if error <= 1e-2 * size else GroupedAttention()
