"""Attention in float32 to all keys up to a query's own, on a CPU with AVX-512, where torch's kernel is slower."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._common import fake, refuse_gradient, refuse_transforms
from ._library import registered

_STEP = 16  # float32 numbers in a vector
# computed once, since torch.compile cannot trace the question
_FASTER = registered("causal_attention") and bool(torch.ops.qpeft_ext.causal_attention_is_faster())


def is_faster(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether `causal_attention` takes these inputs, and is faster than torch's kernel on this machine.

    It has no gradient, so none may be needed.
    """
    with_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    return (_FASTER and query.device.type == "cpu" and query.dtype == key.dtype == value.dtype == torch.float32
            and query.shape[-1] == value.shape[-1] and query.shape[-1] % _STEP == 0
            and query.shape[1] % key.shape[1] == 0 and query.shape[2] <= key.shape[2] and not with_grad)  # fmt: skip


def causal_attention(query: Tensor, key: Tensor, value: Tensor, starts: Sequence[int], scale: float) -> Tensor:
    """Compute softmax(scale * query @ key.T) @ value, where query l sees the keys from an item's start to T - L + l.

    Repeated calls return the same bits; an item of the batch does not depend on the others. There is no gradient.

    Args:
        query: ``[B, H, L, D]``, float32, D a multiple of 16.
        key: ``[B, K, T, D]``, float32, T at least L; H / K heads of queries share one head of keys.
        value: as key.
        starts: the first key of each item, B ints in [0, T].
        scale: factor on the products of query and key.
    Returns: ``[B, L, H, D]``, float32. A query without any key gets 0. A value that is not finite makes NaN of the
        queries that see it, and may of the 7 rows before them, which are multiplied together; torch's kernels make NaN
        of every query of the item.
    Raises:
        ValueError: if an input requires a gradient.
        RuntimeError: for other shapes or dtypes.
    """
    refuse_transforms("causal_attention", query, key, value)
    refuse_gradient("causal_attention", query=query, key=key, value=value)
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    return torch.ops.qpeft_ext.causal_attention(query, key, value, list(starts), scale)


def reference(query: Tensor, key: Tensor, value: Tensor, starts: Sequence[int], scale: float) -> Tensor:
    """Compute `causal_attention` by its definition, in float64."""
    groups, L, T = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    key, value = (x.double().repeat_interleave(groups, 1) for x in (key, value))
    slots, last = torch.arange(T), torch.arange(T - L, T)[:, None]
    seen = (slots >= torch.tensor(starts)[:, None, None]) & (slots <= last)
    scores = (scale * query.double() @ key.mT).masked_fill(~seen[:, None], -torch.inf)
    return (scores.softmax(-1).nan_to_num(0.0) @ value).transpose(1, 2)


@fake("causal_attention")
def _(query, key, value, starts, scale):
    B, H, L, D = query.shape
    return query.new_empty(B, L, H, D)
