"""Log-probability of given tokens from hidden states, without the logits of the whole vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import uses_reference
from ._common import (
    add_product,
    block_dtype,
    check_ids,
    differentiable,
    expect_device,
    expect_dtype,
    expect_like,
    expect_shape,
    fake,
    implement,
    multiply,
    sum_dtype,
)


def token_log_likelihood(
    hidden: Tensor,
    lm_head: Tensor,
    target_ids: Tensor,
    bias: Tensor | None = None,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
    chunk_bytes: int = 64 << 20,
) -> Tensor:
    """Log-probability of each query token, without storing the ``[N, V]`` logits.

    log p = z[target] - logsumexp(z), z = soft_cap * tanh(u / soft_cap), u = logit_scale * hidden @ lm_head.T + bias.

    Args:
        hidden: final hidden state at the position *before* each query token, ``[N, D]``, floating.
        lm_head: output embedding of the LM, ``[V, D]``, same dtype and device. The gradient reaches it, and
            the bias, if they ask for one.
        target_ids: the query tokens, ``[N]``, int64 in ``[0, V)``.
        bias: ``[V]`` or None, same dtype.  soft_cap: positive, or None.  logit_scale: a factor on the logits.
        chunk_bytes: working memory: logits of a chunk of the vocabulary, its rows in float32 where ``lm_head`` is bf16
            on the CPU, and the sums for the gradient. At least one word at a time.
    Returns: log p in nats, ``[N]``, float32 (float64 for float64 inputs); logits are never rounded to bf16.
    Raises: ValueError for shapes, devices, settings; TypeError for a dtype; IndexError for an id out of range (on CUDA
        nothing can be raised without waiting: log p is -inf).
    Source: the score of UPR, Sachan et al. 2022, https://arxiv.org/abs/2204.07496.
    """
    check_token_log_likelihood(hidden, lm_head, target_ids, bias, soft_cap, chunk_bytes)
    if uses_reference(hidden.device):
        return reference(hidden, lm_head, target_ids, bias, soft_cap, logit_scale)
    want_expectation = torch.is_grad_enabled() and hidden.requires_grad
    return torch.ops.qpeft_ext.token_log_likelihood(
        hidden, lm_head, target_ids, bias, soft_cap, logit_scale, chunk_bytes, want_expectation
    )[0]


def check_token_log_likelihood(hidden, lm_head, target_ids, bias, soft_cap, chunk_bytes) -> None:
    op = "token_log_likelihood"
    expect_shape(op, "hidden", hidden, "[N, D]", (None, None))
    expect_shape(op, "lm_head", lm_head, "[V, D]", (None, hidden.shape[1]))
    expect_shape(op, "target_ids", target_ids, "[N]", (hidden.shape[0],))
    expect_like(op, "lm_head", lm_head, "hidden", hidden)
    expect_dtype(op, "target_ids", target_ids, torch.int64)
    expect_device(op, "target_ids", target_ids, "hidden", hidden)
    if bias is not None:
        expect_shape(op, "bias", bias, "[V]", (lm_head.shape[0],))
        expect_like(op, "bias", bias, "hidden", hidden)
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"{op}: soft_cap must be positive or None, got {soft_cap}")
    if chunk_bytes < 1:
        raise ValueError(f"{op}: chunk_bytes must be positive, got {chunk_bytes}")


def reference(hidden, lm_head, target_ids, bias=None, soft_cap=None, logit_scale=1.0, chunk_bytes=None) -> Tensor:
    """The definition. ``chunk_bytes`` changes no number."""
    dtype = sum_dtype(hidden.dtype)
    logits = logit_scale * (hidden.to(dtype) @ lm_head.to(dtype).T)  # [N, V]
    if bias is not None:
        logits = logits + bias.to(dtype)
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    return logits.log_softmax(-1).gather(-1, target_ids[:, None])[:, 0]


# ---- the operator, for both devices: primitives and what they promise are in csrc/ops.cpp ----------------------------


def _chunks(hidden: Tensor, lm_head: Tensor, bias: Tensor | None, chunk_bytes: int, held: int = 0):
    """(words, lm_head rows, logits, bias) of each chunk; ``held`` bytes of the budget are taken already."""
    dtype = sum_dtype(hidden.dtype)
    gemm_dtype = block_dtype(lm_head)
    (N, D), V = hidden.shape, lm_head.shape[0]
    upcast = D if gemm_dtype != lm_head.dtype else 0
    bytes_per_word = (N + upcast) * dtype.itemsize
    size = max(1, max(chunk_bytes - held, chunk_bytes // 4) // max(bytes_per_word, 1))
    size = -(-V // -(-V // size)) if V else 1  # as many chunks, of equal size
    hidden = hidden.to(gemm_dtype)
    rows_buffer = lm_head.new_empty(size, D, dtype=gemm_dtype) if upcast else None
    out = hidden.new_empty(N * size) if gemm_dtype == dtype else None
    for first in range(0, V, size):
        here = slice(first, min(first + size, V))
        C = here.stop - first
        rows = rows_buffer[:C].copy_(lm_head[here]) if upcast else lm_head[here]
        if out is None:
            logits = multiply(hidden, rows.T)
        else:
            logits = torch.mm(hidden, rows.T, out=out[: N * C].view(N, C))
        yield here, rows, logits, None if bias is None else bias[here].to(dtype)


@implement("token_log_likelihood")
def _forward(hidden, lm_head, target_ids, bias, soft_cap, logit_scale, chunk_bytes, want_expectation):
    """Online log-sum-exp over chunks of the vocabulary.

    For the gradient it also sums up E = sum_v p_v dz_v/du_v lm_head[v], rescaled as the maximum grows, so that the
    backward pass is one multiplication: d log p / d hidden = logit_scale * (dz/du lm_head[target] - E).
    """
    check_ids("token_log_likelihood", "target_ids", target_ids, lm_head.shape[0], "V")
    dtype, (N, D) = sum_dtype(hidden.dtype), hidden.shape
    running = hidden.new_full((4, N), -torch.inf, dtype=dtype)
    running[1] = 0
    expectation = hidden.new_zeros((N, D) if want_expectation else (0,), dtype=dtype)
    held = expectation.numel() * dtype.itemsize
    target_ids = target_ids.contiguous()
    for here, rows, logits, bias_here in _chunks(hidden, lm_head, bias, chunk_bytes, held):
        torch.ops.qpeft_ext.token_log_likelihood_chunk(
            logits, bias_here, target_ids, here.start, logit_scale, soft_cap, running, want_expectation
        )
        if want_expectation:
            expectation *= running[3, :, None]
            add_product(expectation, logits.to(rows.dtype), rows)
    rows = logits = None  # the chunk's memory goes back before the rows of the targets come
    maximum, total, target, _ = running
    lse = maximum + total.log()
    if want_expectation:
        slope = torch.ones_like(target) if soft_cap is None else 1 - (target / soft_cap).square()
        expectation *= -1 / total[:, None]
        expectation.addcmul_(slope[:, None], lm_head[target_ids].to(dtype)).mul_(logit_scale)
    return target - lse, lse, expectation


@fake("token_log_likelihood")
def _(hidden, lm_head, target_ids, bias, soft_cap, logit_scale, chunk_bytes, want_expectation):
    N, dtype = hidden.shape[0], sum_dtype(hidden.dtype)
    shape = hidden.shape if want_expectation else (0,)
    return hidden.new_empty(N, dtype=dtype), hidden.new_empty(N, dtype=dtype), hidden.new_empty(shape, dtype=dtype)


@implement("token_log_likelihood_backward")
def _backward(grad_log_p, lse, hidden, lm_head, target_ids, bias, soft_cap, logit_scale, chunk_bytes):
    """Gradient to lm_head and bias: the chunks once more."""
    dtype = sum_dtype(hidden.dtype)
    grad_lm_head = torch.empty_like(lm_head)
    grad_bias = None if bias is None else torch.empty_like(bias)
    grad_log_p, target_ids = grad_log_p.to(dtype).contiguous(), target_ids.contiguous()
    for here, rows, logits, bias_here in _chunks(hidden, lm_head, bias, chunk_bytes):
        torch.ops.qpeft_ext.token_log_likelihood_chunk_backward(
            logits, bias_here, target_ids, here.start, logit_scale, soft_cap, lse, grad_log_p
        )
        grad_lm_head[here] = logit_scale * multiply(logits.to(rows.dtype).T, hidden.to(rows.dtype))
        if bias is not None:
            grad_bias[here] = logits.sum(0)
    return grad_lm_head, lm_head.new_empty(0) if bias is None else grad_bias


@fake("token_log_likelihood_backward")
def _(grad_log_p, lse, hidden, lm_head, target_ids, bias, soft_cap, logit_scale, chunk_bytes):
    return torch.empty_like(lm_head), lm_head.new_empty(0) if bias is None else torch.empty_like(bias)


def _setup_context(ctx, inputs, output) -> None:
    hidden, lm_head, target_ids, bias, *ctx.settings, want_expectation = inputs
    _, lse, expectation = output
    ctx.mark_non_differentiable(lse, expectation)
    ctx.hidden_dtype = hidden.dtype
    ctx.save_for_backward(expectation if want_expectation else None, lse, hidden, lm_head, target_ids, bias)


def _autograd(ctx, grad_log_p, *_):
    expectation, lse, *inputs = ctx.saved_tensors
    want_hidden, want_lm_head, _, want_bias, *_ = ctx.needs_input_grad
    grad_hidden = grad_lm_head = grad_bias = None
    if want_hidden:
        if expectation is None:
            raise ValueError("token_log_likelihood: hidden needs a gradient, so want_expectation must be True")
        grad_hidden = (grad_log_p[:, None] * expectation).to(ctx.hidden_dtype)
    if want_lm_head or want_bias:
        grad_lm_head, grad_bias = torch.ops.qpeft_ext.token_log_likelihood_backward(
            grad_log_p, lse, *inputs, *ctx.settings
        )
    if not want_bias:
        grad_bias = None
    if not want_lm_head:
        grad_lm_head = None
    return grad_hidden, grad_lm_head, None, grad_bias, None, None, None, None


differentiable("token_log_likelihood", _setup_context, _autograd)
