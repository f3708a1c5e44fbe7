"""What layers of an LM compute between products on a CPU, against transformers' own: norm, gate, rotary embedding.

    python benchmarks/bench_layers.py --threads 2 --repeats 7

``prefixes``: 7 documents of 279 tokens, ``suffixes``: 56 pairs of 40 tokens, of an LM of width 576 as SmolLM2-135M (9
heads of queries and 3 of keys, width 64; 1,536 inside the feed-forward layer); ``llama-3``: 2,048 tokens, width 4096,
32 and 8 heads, width 128, 14,336 inside. Float32, and bfloat16 where the name ends in ``@bf16``.

    ours            `ops.rms_norm`, `ops.gated_silu`, `ops.rotary`
    transformers    the code of its Llama
    torch_compile   the same, compiled by torch.compile
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from common import Case, main, run_tiny
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from qpeft_ext.ops.gated_silu import gated_silu
from qpeft_ext.ops.rms_norm import rms_norm
from qpeft_ext.ops.rotary import rotary

EPS = 1e-6
BFLOAT16 = "@bf16"


class Size(NamedTuple):
    """B rows of L tokens through a layer."""

    rows: int
    tokens: int
    width: int
    inner: int
    heads: int
    groups: int

    @property
    def head_width(self) -> int:
        return self.width // self.heads


SIZES = {
    "prefixes": Size(7, 279, 576, 1536, 9, 3),
    "suffixes": Size(56, 40, 576, 1536, 9, 3),
    "llama-3": Size(8, 256, 4096, 14336, 32, 4),
}


def norm(size: Size, draw: Callable[..., Tensor]):
    """Return the inputs that need a gradient, ours, and theirs."""
    weight = draw(size.width)
    module = LlamaRMSNorm(size.width, EPS)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    x = draw(size.rows, size.tokens, size.width)
    return [x], lambda x: [rms_norm(x, weight, EPS)], lambda x: [module(x)]


def gate(size: Size, draw: Callable[..., Tensor]):
    inputs = [draw(size.rows, size.tokens, size.inner) for _ in range(2)]
    return inputs, lambda g, u: [gated_silu(g, u)], lambda g, u: [torch.nn.functional.silu(g) * u]


def embedding(size: Size, draw: Callable[..., Tensor]):
    shapes = [(size.rows, size.tokens, heads, size.head_width) for heads in (size.heads, size.heads // size.groups)]
    inputs = [draw(*shape).transpose(1, 2) for shape in shapes]
    cos, sin = (draw(1, size.tokens, size.head_width) for _ in range(2))
    return (
        inputs,
        lambda q, k: [rotary(q, cos, sin), rotary(k, cos, sin)],
        lambda q, k: list(apply_rotary_pos_emb(q, k, cos, sin)),
    )


OPS = {"rms_norm": norm, "gated_silu": gate, "rotary": embedding}


def error(first: list[Tensor], second: list[Tensor]) -> float:
    """Raises: AssertionError above 1 % of the norm."""
    largest = max(float((a.float() - b.float()).norm() / a.float().norm()) for a, b in zip(first, second, strict=True))
    assert largest <= 1e-2, f"differs by {largest:.1e}"
    return largest


def make(op: str, size: Size, backward: bool, dtype: torch.dtype):
    def case(device) -> Case:
        random = torch.Generator().manual_seed(0)
        inputs, ours, theirs = OPS[op](size, lambda *shape: torch.randn(shape, generator=random).to(dtype))
        inputs = [x.detach().requires_grad_(backward) for x in inputs]
        grads = [torch.randn_like(x) for x in inputs[: 1 if op == "gated_silu" else None]]

        def run(function):
            if not backward:
                return lambda _: torch.no_grad()(function)(*inputs)
            return lambda _: list(torch.autograd.grad(function(*inputs), inputs, grads))

        moved = sum(x.numel() * x.element_size() for x in (*inputs, *grads, *(inputs if backward else ())))
        return Case([None], run(ours), {"transformers": run(theirs), "torch_compile": run(torch.compile(theirs))},
                    error, moved, 0)  # fmt: skip

    return case


WORKS = {
    f"{op}/{name}{'/backward' * backward}{end}": make(op, size, backward, dtype)
    for op in OPS
    for end, dtype in (("", torch.float32), (BFLOAT16, torch.bfloat16))
    for name, size in SIZES.items()
    for backward in (False, True)
}
TINY = Size(2, 3, 40, 24, 4, 2)
WORKS |= {f"tiny/{op}": make(op, TINY, True, torch.float32) for op in OPS}


@pytest.mark.parametrize("function", ["ours", "transformers"])
@pytest.mark.parametrize("op", OPS)
def test_tiny(benchmark, op, function):
    run_tiny(benchmark, {"tiny": WORKS[f"tiny/{op}"]}, function)


if __name__ == "__main__":
    main("layers", WORKS, cpu=tuple(name for name in WORKS if "tiny" not in name))
