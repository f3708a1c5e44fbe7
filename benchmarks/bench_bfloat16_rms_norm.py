"""Root-mean-square norm of bfloat16 on a CPU, against torch's and transformers'.

    python benchmarks/bench_bfloat16_rms_norm.py --threads 2 --repeats 7

``prefixes``: 7 documents of 279 tokens, width 512 (a training pass of the English base LM of benchmarks/base_lm);
``suffixes``: 56 pairs of 40 tokens; ``llama-3``: 2,048 tokens, width 4096. The weight is frozen.

    ours            `ops.bfloat16_rms_norm`
    transformers    `LlamaRMSNorm`
    torch           `torch.nn.functional.rms_norm`, which does not round before the weight
    torch_compile   `LlamaRMSNorm` compiled by torch.compile
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import pytest
import torch
from common import Case, main, run_tiny
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qpeft_ext.ops.bfloat16_rms_norm import bfloat16_rms_norm
from qpeft_ext.ops.hardware import has_bfloat16_products

EPS = 1e-6


class Inputs(NamedTuple):
    x: Tensor  # [N, D]
    weight: Tensor  # [D]
    grad: Tensor  # [N, D]


def make_inputs(N: int, D: int) -> Inputs:
    random = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(N, D, generator=random).bfloat16() for _ in range(2))
    return Inputs(x.requires_grad_(), torch.randn(D, generator=random).bfloat16(), grad)


def error(first, second) -> float:
    """Raises: AssertionError above 1 % of the norm."""
    largest = max(float((a.float() - b.float()).norm() / a.float().norm()) for a, b in zip(first, second, strict=True))
    assert largest <= 1e-2, f"differs by {largest:.1e}"
    return largest


def make(N: int, D: int, backward: bool = False):
    def case(device) -> Case:
        x, weight, grad = make_inputs(N, D)
        module = LlamaRMSNorm(D, EPS)
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
        compiled = torch.compile(module)

        def run(function):
            if not backward:
                return lambda _: [torch.no_grad()(function)(x)]
            return lambda _: torch.autograd.grad(function(x), x, grad)

        baselines = {
            "transformers": run(module),
            "torch": run(lambda x: torch.nn.functional.rms_norm(x, (D,), weight, EPS)),
            "torch_compile": run(compiled),
        }
        ours = run(lambda x: bfloat16_rms_norm(x, weight, EPS))
        return Case([None], ours, baselines, error, x.numel() * 2 * (5 if backward else 2), 0)

    return case


SHAPES = {"prefixes": (7 * 279, 512), "suffixes": (56 * 40, 512), "llama-3": (2048, 4096)}
WORKS = {"tiny": make(6, 40, backward=True)}
for name, shape in SHAPES.items():
    WORKS[f"bfloat16_rms_norm/{name}"] = make(*shape)
    WORKS[f"bfloat16_rms_norm/{name}/backward"] = make(*shape, backward=True)


@pytest.mark.skipif(not has_bfloat16_products(), reason="this processor has no products of bfloat16")
@pytest.mark.parametrize("function", ["ours", "transformers", "torch", "torch_compile"])
def test_tiny(benchmark, function):
    run_tiny(benchmark, WORKS, function)


if __name__ == "__main__":
    if not has_bfloat16_products():
        sys.exit(print("nothing to measure: this processor has no products of bfloat16"))
    main("bfloat16_rms_norm", WORKS, cpu=tuple(WORKS))
