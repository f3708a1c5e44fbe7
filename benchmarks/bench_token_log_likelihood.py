"""token_log_likelihood against full logits, its own algorithm in plain PyTorch, and the fused kernels of others."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from common import FIRST, MODELS, SETS, Case, T, compiled, main, run_tiny, works
from timing import default_dtype, normal
from torch import Tensor

from qpeft_ext.ops import token_log_likelihood
from qpeft_ext.ops._common import add_product, block_dtype, multiply
from qpeft_ext.ops.token_log_likelihood import reference

CHUNK_BYTES = 64 << 20  # as ours has
ROWS = 2048  # of same_algorithm_torch at a time: with more its chunks would be narrow


class Inputs(NamedTuple):
    hidden: Tensor  # [N, D]
    lm_head: Tensor  # [V, D]
    target_ids: Tensor  # [N]


def make_inputs(N: int, D: int, V: int, device: torch.device) -> list[Inputs]:
    lm_head = normal(device, V, D).div_(D**0.5)
    sets = []
    for seed in range(1 if device.type == "cpu" else SETS):
        target_ids = torch.randint(V, (N,), generator=torch.Generator().manual_seed(seed))
        sets.append(Inputs(normal(device, N, D, seed=seed + 1), lm_head, target_ids.to(device)))
    return sets


def eager(hidden, lm_head, target_ids):
    """Compute as one usually writes it: logits in the model's dtype, the softmax in float32."""
    logits = hidden @ lm_head.T
    return logits.float().log_softmax(-1).gather(-1, target_ids[:, None])[:, 0]


class SameAlgorithm(torch.autograd.Function):
    """Our algorithm in plain PyTorch: chunks of the vocabulary, with the sum for the gradient in the forward pass."""

    @staticmethod
    def forward(ctx, hidden, lm_head, target_ids):
        (N, D), item = hidden.shape, 4
        wanted, ctx.dtype = ctx.needs_input_grad[0], hidden.dtype
        size = max(1, (CHUNK_BYTES - wanted * N * D * item) // (N * item * 2))  # logits and their exponentials
        largest = hidden.new_full((N, 1), -torch.inf, dtype=torch.float32)
        total = torch.zeros_like(largest)
        mean = hidden.new_zeros(N, D, dtype=torch.float32) if wanted else None
        for rows in lm_head.split(size):
            rows = rows.to(block_dtype(lm_head))
            logits = multiply(hidden.to(rows.dtype), rows.T)
            if not wanted:
                largest, total = _merge(largest, total, logits)
                continue
            before, largest = largest, torch.maximum(largest, logits.amax(1, keepdim=True))
            factor, share = (before - largest).exp(), (logits - largest).exp_()
            total = total * factor + share.sum(1, keepdim=True)
            mean.mul_(factor)
            add_product(mean, share.to(rows.dtype), rows)
        rows = lm_head[target_ids].float()
        target = (hidden.detach().float() * rows).sum(1, keepdim=True)
        if wanted:
            ctx.save_for_backward(rows.sub_(mean.div_(total)))
        return (target - largest - total.log())[:, 0]

    @staticmethod
    def backward(ctx, grad):
        (difference,) = ctx.saved_tensors
        return (grad[:, None] * difference).to(ctx.dtype), None, None


def _merge(largest, total, logits):
    lse = logits.logsumexp(1, keepdim=True)
    larger = torch.maximum(largest, lse)
    return larger, total * (largest - larger).exp() + (lse - larger).exp()


def same_algorithm_torch(hidden, lm_head, target_ids):
    blocks = zip(hidden.split(ROWS), target_ids.split(ROWS), strict=True)
    return torch.cat([SameAlgorithm.apply(some, lm_head, targets) for some, targets in blocks])


def others(device: torch.device) -> tuple[dict, dict]:
    """Find the fused kernels of other packages: functions by name, and by name why one is missing."""
    found, missing = {}, {}
    if device.type == "cpu":
        return found, {name: "its kernels need a GPU" for name in ("liger", "cut_cross_entropy")}
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

        found["liger"] = lambda h, w, t: -liger(h, w, t, reduction="none")
    except ImportError as error:
        missing["liger"] = f"not installed ({error})"
    try:
        from cut_cross_entropy import linear_cross_entropy as cut

        found["cut_cross_entropy"] = lambda h, w, t: -cut(h, w, t, reduction="none")
    except ImportError as error:
        missing["cut_cross_entropy"] = f"not installed ({error})"
    return found, missing


def error(most):
    def check(ours, theirs) -> float:
        difference = (ours - theirs).abs().max().item()
        assert difference < most, f"log-probabilities differ by {difference}"
        return difference

    return check


def gradient_error(most):
    def check(ours, theirs) -> float:
        difference = ((ours[0] - theirs[0]).float().norm() / theirs[0].float().norm()).item()
        assert difference < most, f"gradients differ by {difference}"
        return difference

    return check


def make(queries, each, shared, D, V, backward, T=T, dtype=None):
    def case(device):
        low = dtype or default_dtype(device)
        sets = [
            x._replace(hidden=x.hidden.to(low), lm_head=x.lm_head.to(low))
            for x in make_inputs(queries * each * T, D, V, device)
        ]

        def step(function):
            def run(x: Inputs):
                if not backward:
                    with torch.no_grad():
                        return function(*x)
                hidden = x.hidden.detach().requires_grad_()
                return torch.autograd.grad(function(hidden, *x[1:]).sum(), hidden)

            return run

        N, lm_head = len(sets[0].hidden), sets[0].lm_head
        functions, missing = others(device)
        functions = {"same_algorithm_torch": same_algorithm_torch, **functions}
        if N * V * 4 < 30e9:  # logits of everything, several times
            functions = {"textbook": reference, **functions}
            if low != torch.float32:
                functions["eager"] = eager
        else:
            missing |= {name: f"its logits take {N * V * 4 / 1e9:.0f} GB" for name in ("textbook", "eager")}
        if device.type == "cpu" or (V in (MODELS[FIRST][1], 128256) and (queries, each) == (1, 100)):
            functions["torch_compile"] = compiled(eager, device)
        flops = 2 * N * lm_head.numel() * (2 if backward else 1)
        exact = low == torch.float32  # others round logits to bf16
        check = gradient_error(1e-4 if exact else 3e-2) if backward else error(1e-3 if exact else 1e-1)
        read = lm_head.numel() * lm_head.element_size()
        baselines = {name: step(function) for name, function in functions.items()}
        if low != default_dtype(device):
            read = flops = 0  # the machine's rates are those of another dtype
        return Case(sets, step(token_log_likelihood), baselines, check, read, flops, missing)

    return case


WORKS = {"tiny": make(1, 5, False, 64, 500, True, T=2), **works("token_log_likelihood", make)}
WORKS |= {
    f"token_log_likelihood/1x100{end}@bf16": make(1, 100, False, *MODELS[FIRST], bool(end), dtype=torch.bfloat16)
    for end in ("", "/backward")
}  # on a GPU everything is
CPU = (
    "token_log_likelihood/1x100",
    "token_log_likelihood/1x100/backward",
    "token_log_likelihood/1x100@bf16",
    "token_log_likelihood/1x100/backward@bf16",
    "token_log_likelihood/4x8",
    "token_log_likelihood/4x8/backward",
    "token_log_likelihood/1x100@llama-3-8b",
    "token_log_likelihood/1x100/backward@llama-3-8b",
)
TARGETS = tuple(name for name in CPU if "@llama" in name)


@pytest.mark.parametrize("function", ["ours", "textbook", "same_algorithm_torch"])
def test_tiny(benchmark, function):
    run_tiny(benchmark, WORKS, function)


if __name__ == "__main__":
    main("token_log_likelihood", WORKS, CPU, TARGETS)
