"""Attention of bfloat16 on a CPU with AMX, against torch's.

    python benchmarks/bench_bfloat16_attention.py --threads 2 --repeats 7

``suffixes``: 40 pairs of reranking, 32 rows after a prefix of 267, 8 heads of queries and 4 of keys, width 64 (the
English base LM of benchmarks/base_lm); ``llama-3``: 16 pairs, 40 rows after 260, 32 heads and 8, width 128;
``prefixes``: 32 documents of 260 tokens, 8 heads, as a trained soft prompt or LoRA reads them.

    ours      `ops.bfloat16_attention`
    sdpa      `scaled_dot_product_attention`; the queries of a group are rows of one head, so that no keys are copied
    float32   the same with everything in float32, which is what ours sums in
    eager     matrix products of bfloat16 and a softmax in float32, as transformers' "eager": scores are rounded
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import pytest
import torch
from common import Case, main, run_tiny
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qpeft_ext.ops.bfloat16_attention import bfloat16_attention
from qpeft_ext.ops.hardware import multiplies_bfloat16_by_tiles


class Inputs(NamedTuple):
    query: Tensor  # [B, H, L, D]
    key: Tensor  # [B, K, T, D]
    value: Tensor
    mask: Tensor  # bool [B, 1, L, T]
    grad: Tensor  # [B, L, H, D]


def make_inputs(B: int, H: int, K: int, L: int, T: int, D: int) -> Inputs:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).bfloat16()

    query = normal(B, L, H, D).transpose(1, 2)
    starts = torch.randint(0, T - L + 1, (B, 1, 1, 1), generator=random)  # prefixes are padded on the left
    mask = torch.ones(L, T, dtype=torch.bool).tril(T - L) & (torch.arange(T) >= starts)
    tensors = [x.requires_grad_() for x in (query, normal(B, K, T, D), normal(B, K, T, D))]
    return Inputs(*tensors, mask, normal(B, L, H, D))


def ours(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return bfloat16_attention(query, key, value, mask, query.shape[-1] ** -0.5)


def grouped(query: Tensor, heads: int, mask: Tensor) -> tuple[Tensor, Tensor]:
    B, H, L, D = query.shape
    return query.reshape(B, heads, H // heads * L, D), mask.repeat(1, 1, H // heads, 1)


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    rows, masks = grouped(query, key.shape[1], mask)
    found = scaled_dot_product_attention(rows, key, value, attn_mask=masks)
    return found.view(query.shape).transpose(1, 2).contiguous()


def float32(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return sdpa(query.float(), key.float(), value.float(), mask).bfloat16()


def eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    rows, masks = grouped(query, key.shape[1], mask)
    scores = (rows @ key.mT * query.shape[-1] ** -0.5).masked_fill(~masks, torch.finfo(query.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).view(query.shape).transpose(1, 2).contiguous()


def error(first, second) -> float:
    """Raises: AssertionError above 2 % of the norm."""
    largest = max(float((a.float() - b.float()).norm() / a.float().norm()) for a, b in zip(first, second, strict=True))
    assert largest <= 2e-2, f"differs by {largest:.1e}"
    return largest


def make(B: int, H: int, K: int, L: int, T: int, D: int, backward: bool = False):
    def case(device) -> Case:
        x = make_inputs(B, H, K, L, T, D)

        def run(function):
            if not backward:
                return lambda _: [torch.no_grad()(function)(*x[:4])]
            return lambda _: torch.autograd.grad(function(*x[:4]), x[:3], x.grad)

        read = sum(t.numel() * t.element_size() for t in x[:4]) * (2 if backward else 1)
        baselines = {f.__name__: run(f) for f in (sdpa, float32, eager)}
        return Case([None], run(ours), baselines, error, read, 4 * B * H * L * T * D * (3.5 if backward else 1))

    return case


SHAPES = {
    "suffixes": (40, 8, 4, 32, 299, 64),
    "llama-3": (16, 32, 8, 40, 300, 128),
    "prefixes": (32, 8, 8, 260, 260, 64),
}
WORKS = {"tiny": make(2, 4, 2, 20, 50, 32, backward=True)}
for name, shape in SHAPES.items():
    WORKS[f"bfloat16_attention/{name}"] = make(*shape)
    WORKS[f"bfloat16_attention/{name}/backward"] = make(*shape, backward=True)


@pytest.mark.skipif(not multiplies_bfloat16_by_tiles(), reason="this processor has no AMX")
@pytest.mark.parametrize("function", ["ours", "sdpa", "float32", "eager"])
def test_tiny(benchmark, function):
    run_tiny(benchmark, WORKS, function)


if __name__ == "__main__":
    if not multiplies_bfloat16_by_tiles():
        sys.exit(print("nothing to measure: this processor has no AMX"))
    main("bfloat16_attention", WORKS, cpu=tuple(WORKS))
