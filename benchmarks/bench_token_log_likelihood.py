"""token_log_likelihood against full logits and its own algorithm in plain PyTorch, eager and compiled."""

from __future__ import annotations

import pytest
import torch
from common import Case, D, T, V, main, run_tiny
from torch.utils.checkpoint import checkpoint

from qpeft_ext.ops import token_log_likelihood
from qpeft_ext.ops.token_log_likelihood import reference

CHUNK_BYTES = 64 << 20


def make(N, device, V=V, D=D):
    random = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    hidden, lm_head = torch.randn(N, D, generator=random), torch.randn(V, D, generator=random) / D**0.5
    target_ids = torch.randint(V, (N,), generator=random)
    return hidden.to(device, dtype), lm_head.to(device, dtype), target_ids.to(device)


def eager(hidden, lm_head, target_ids):
    """What one writes: logits in the model's dtype, the softmax in float32."""
    logits = hidden @ lm_head.T
    return logits.float().log_softmax(-1).gather(-1, target_ids[:, None])[:, 0]


def same_algorithm_torch(hidden, lm_head, target_ids):
    """Chunks of the vocabulary, their log-sum-exps; a chunk is computed again in the backward pass."""
    size = max(1, CHUNK_BYTES // (4 * hidden.shape[0]))

    def chunk(hidden, rows):
        return (hidden @ rows.T).float().logsumexp(-1)

    parts = [
        checkpoint(chunk, hidden, rows, use_reentrant=False) if hidden.requires_grad else chunk(hidden, rows)
        for rows in lm_head.split(size)
    ]
    target = (hidden.float() * lm_head[target_ids].float()).sum(-1)
    return target - torch.stack(parts).logsumexp(0)


def error(ours, theirs) -> float:
    difference = (ours - theirs).abs().max().item()
    assert difference < (1e-3 if ours.device.type == "cpu" else 5e-2), f"log-probabilities differ by {difference}"
    return difference


def gradient_error(ours, theirs) -> float:
    difference = ((ours[0] - theirs[0]).float().norm() / theirs[0].float().norm()).item()
    assert difference < (1e-4 if ours[0].device.type == "cpu" else 3e-2), f"gradients differ by {difference}"
    return difference


def works(N, backward, **shape):
    def case(device):
        hidden, lm_head, target_ids = make(N, device, **shape)
        hidden.requires_grad_(backward)

        def step(function):
            if not backward:
                with torch.no_grad():
                    return function(hidden, lm_head, target_ids)
            return torch.autograd.grad(function(hidden, lm_head, target_ids).sum(), hidden)

        compiled = torch.compile(eager)
        functions = {
            "textbook": reference if device.type == "cpu" else eager,
            "same_algorithm_torch": same_algorithm_torch,
            "torch_compile": compiled,
        }
        baselines = {name: lambda function=function: step(function) for name, function in functions.items()}
        flops = 2 * hidden.shape[0] * lm_head.numel() * (2 if backward else 1)
        check = gradient_error if backward else error
        read = lm_head.numel() * lm_head.element_size()
        return Case(lambda: step(token_log_likelihood), baselines, check, read, flops)

    return case


WORKS = {
    "tiny": works(10, True, V=500, D=64),
    "token_log_likelihood/1x100": works(100 * T, False),
    "token_log_likelihood/4x8": works(32 * T, False),
    "token_log_likelihood/1x100/backward": works(100 * T, True),
    "token_log_likelihood/4x8/backward": works(32 * T, True),
    "token_log_likelihood/1x100/v128256": works(100 * T, False, V=128256),
    "token_log_likelihood/1x100/v128256/backward": works(100 * T, True, V=128256),
}
DEFAULT = {"cpu": tuple(w for w in WORKS if w != "tiny"), "cuda": tuple(w for w in WORKS if w != "tiny")}


@pytest.mark.parametrize("function", ["ours", "textbook", "same_algorithm_torch"])
def test_tiny(benchmark, function):
    run_tiny(benchmark, WORKS, function)


if __name__ == "__main__":
    main("token_log_likelihood", WORKS, DEFAULT)
