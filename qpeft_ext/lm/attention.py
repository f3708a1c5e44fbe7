"""How the layers of an LM attend during the engine's passes, where that is faster than transformers' "sdpa".

* bfloat16 on a CPU with AMX: `ops.bfloat16_attention`, in all passes.
* Several query heads share one head of keys and values (grouped-query attention): with a mask, transformers' "sdpa"
  copies the keys and values of every pair for each head of a group first. In suffix passes the queries of a group are
  rows of one head instead, so that nothing is copied: a suffix has 40 rows, a prefix some hundred. transformers does
  the same where there is one query token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import local

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..ops.bfloat16_attention import bfloat16_attention, is_supported

SDPA, OURS = "sdpa", "qpeft_sdpa"  # names of attention implementations
_this_thread = local()  # passes: how many are active in it


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
    """transformers' attention function; what it does not know goes to "sdpa".

    query [B, H, L, D], key and value [B, H / groups, S, D], attention_mask [B or 1, 1, L, S].
    Returns: [B, L, H, D of a value].
    """
    B, H, L, D = query.shape
    heads = key.shape[1]
    known = _in_pass() and attention_mask is not None and attention_mask.shape[1] == 1 and H % heads == 0
    if not known or any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "s_aux")):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if not dropout and is_supported(query, key, value, attention_mask):
        return bfloat16_attention(query, key, value, attention_mask, D**-0.5 if scaling is None else scaling), None
    if H == heads:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    groups = H // heads
    found = nn.functional.scaled_dot_product_attention(
        query.reshape(B, heads, groups * L, D), key, value, attn_mask=attention_mask.repeat(1, 1, groups, 1),
        dropout_p=dropout, scale=scaling)  # fmt: skip
    return found.reshape(B, H, L, -1).transpose(1, 2).contiguous(), None


def _mask(*args, **kwargs) -> Tensor | None:
    """Of "sdpa", and in a pass never left out."""
    return sdpa_mask(*args, **kwargs | ({"allow_is_causal_skip": False} if _in_pass() else {}))


def _in_pass() -> bool:
    """Whether this thread runs a pass; the config says `OURS` in all of them meanwhile."""
    return torch.compiler.is_compiling() or getattr(_this_thread, "passes", 0) > 0


AttentionInterface.register(OURS, attention)
AttentionMaskInterface.register(OURS, _mask)


class LMAttention:
    """The configs of an LM whose attention becomes ours in the thread that enters `active`; none: nothing happens.

    in_prefixes: in passes over prefixes too, where sharing heads in groups is not worth it.
    """

    def __init__(self, configs: Sequence = (), in_prefixes: bool = False) -> None:
        self.configs, self.in_prefixes = list(configs), in_prefixes

    @contextmanager
    def active(self, prefixes: bool = False) -> Iterator[None]:
        here = self.configs if self.in_prefixes or not prefixes else []
        changed = [config for config in here if config._attn_implementation == SDPA]
        _this_thread.passes = getattr(_this_thread, "passes", 0) + 1
        try:
            for config in changed:
                config._attn_implementation = OURS
            yield
        finally:
            _this_thread.passes -= 1
            for config in changed:
                config._attn_implementation = SDPA


def find_attention(lm: nn.Module, decoder: nn.Module, run: Callable[[Tensor], Tensor]) -> LMAttention:
    """`LMAttention` of an LM whose attention is "sdpa", if ours is faster there and gives the same.

    run: attention mask [1, 3] -> final hidden states [1, 3, D] of three tokens.
    """

    def has_sdpa(module: nn.Module) -> bool:
        return getattr(getattr(module, "config", None), "_attn_implementation", None) == SDPA

    weight = next(decoder.parameters())
    by_tiles = is_supported(*weight.new_empty(3, 1, 1, 1, 32), torch.ones(1, 1, 1, 1, dtype=torch.bool))
    worth_it = [
        m
        for m in decoder.modules()
        if has_sdpa(m) and hasattr(m, "is_causal") and (by_tiles or getattr(m, "num_key_value_groups", 1) > 1)
    ]
    if not worth_it or not has_sdpa(decoder) or not getattr(lm, "_supports_attention_backend", False):
        return LMAttention()
    found = LMAttention({id(m.config): m.config for m in (decoder, *worth_it)}.values(), by_tiles)
    mask = torch.tensor([[0, 1, 1]], device=weight.device)
    expected = run(mask)[0, 1:]
    try:
        with found.active():
            got = run(mask)[0, 1:]
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError):  # it calls its attention in its own way
        return LMAttention()
    error, size = (got - expected).float().abs().max(), expected.float().abs().max()
    return found if error <= 1e-2 * size else LMAttention()
