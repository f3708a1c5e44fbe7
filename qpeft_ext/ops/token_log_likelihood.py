"""Log-probabilities of given tokens from hidden states, without the logits of the whole vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..utils.torch_state import refuse_backward_in_autocast
from ._checks import check_ids, expect_device, expect_dtype, expect_like, expect_shape
from ._common import (
    add_product,
    differentiable,
    exact_float32,
    fake,
    implement,
    multiply_rows,
    needs_gradient,
    outside_autocast,
    product_dtype,
    refuse_transforms,
    sum_dtype,
)
from ._library import uses_reference


@outside_autocast
def token_log_likelihood(
    hidden: Tensor,
    lm_head: Tensor,
    target_ids: Tensor,
    bias: Tensor | None = None,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
    chunk_bytes: int = 64 << 20,
) -> Tensor:
    """Compute the log-probability of each target token, without storing the ``[N, V]`` logits.

    log p = z[target] - logsumexp(z), z = soft_cap * tanh(u / soft_cap), u = logit_scale * hidden @ lm_head.T + bias.

    It runs on the CPU and on CUDA. Repeated calls on one device return the same bits, gradients included. Logits are
    float32 sums whatever the dtype of the inputs. The gradient reaches hidden, lm_head and bias if they require one;
    it cannot be differentiated again.

    Args:
        hidden: final hidden state at the position *before* each target token, ``[N, D]``, float32, float64, bfloat16
            or float16.
        lm_head: output embedding of the LM, ``[V, D]``, dtype and device of ``hidden``.
        target_ids: the tokens, ``[N]``, int64 in ``[0, V)``.
        bias: added to the logits before the cap, ``[V]``, same dtype, or None.
        soft_cap: bound of the logits, positive, or None for none.
        logit_scale: factor on the logits before bias and cap.
        chunk_bytes: working memory in bytes: logits of some rows and a chunk of the vocabulary, the chunk's rows of
            ``lm_head`` in float32 where the CPU has no fast products of their dtype (it has those of bfloat16 with AMX
            or AMD's AVX512-BF16), and the sums for the gradient. At least one row and one token are computed at a time.
    Returns: log p in nats, ``[N]``, float32 (float64 for float64 inputs).
    Raises:
        ValueError: if shapes or devices disagree, or soft_cap or chunk_bytes is not positive.
        TypeError: if a dtype is wrong.
        IndexError: if an id is out of range. On CUDA the kernel stops with an error instead.
    Source: the score of UPR, Sachan et al. 2022, https://arxiv.org/abs/2204.07496.

    Example: a vocabulary of two tokens with equal logits, then with logits 2 and 0::

        >>> import torch
        >>> from qpeft_ext.ops import token_log_likelihood
        >>> hidden, lm_head = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [0.0]])
        >>> token_log_likelihood(hidden, lm_head, torch.tensor([0, 1]))
        tensor([-0.6931, -2.1269])
    """
    check_token_log_likelihood(hidden, lm_head, target_ids, bias, soft_cap, chunk_bytes)
    if uses_reference(hidden.device):
        return refuse_backward_in_autocast(reference(hidden, lm_head, target_ids, bias, soft_cap, logit_scale))
    refuse_transforms("token_log_likelihood", hidden, lm_head, bias)
    want_expectation = needs_gradient(hidden)
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
    """Compute `token_log_likelihood` by its definition, in plain PyTorch; ``chunk_bytes`` changes no number."""
    check_ids("token_log_likelihood", "target_ids", target_ids, len(lm_head), "V")
    dtype = sum_dtype(hidden.dtype)
    logits = logit_scale * (hidden.to(dtype) @ lm_head.to(dtype).T)  # [N, V]
    if bias is not None:
        logits = logits + bias.to(dtype)
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    return logits.log_softmax(-1).gather(-1, target_ids[:, None])[:, 0]


# ---- the operator, for both devices: primitives and what they promise are in csrc/ops.cpp ----------------------------

WORDS = 4096  # smallest chunk, where the budget has room for some rows of it: narrow GEMMs are slow
CPU_BUFFER = 8 << 20  # most bytes of logits, or of upcast rows: the C library maps larger buffers anew for every call
TILE_ROWS, TILE_WORDS = 128, 256  # tile of a GEMM on a GPU


class Sizes(NamedTuple):
    """How much of the inputs is multiplied at a time."""

    rows: int  # of hidden
    words: int  # of the vocabulary


def _sizes(hidden: Tensor, lm_head: Tensor, chunk_bytes: int, row_bytes: int) -> Sizes:
    """Choose blocks of rows and chunks of words that fit in the budget: all rows, if `WORDS` words still fit.

    ``row_bytes``: what each row takes besides its logits.
    """
    (N, D), V, item = hidden.shape, lm_head.shape[0], sum_dtype(hidden.dtype).itemsize
    upcast = 0 if product_dtype(lm_head) == lm_head.dtype else D * item  # bytes for each word besides its logits
    if hidden.device.type == "cpu" and product_dtype(lm_head) == torch.bfloat16:
        row_bytes += D * lm_head.dtype.itemsize  # the product packs the rows
    least = min(V, WORDS, max(1, chunk_bytes // (4 * upcast))) if upcast else min(V, WORDS)
    rows = max(1, min(N, (chunk_bytes - least * upcast) // max(1, least * item + row_bytes)))
    most = min(V, max(1, (chunk_bytes - rows * row_bytes) // max(1, rows * item + upcast)))
    if hidden.device.type == "cuda":
        return Sizes(rows, _whole_waves(rows, V, most, *_processors(hidden.device)))
    most = max(1, min(most, CPU_BUFFER // max(rows * item, upcast, 1)))
    equal = -(-V // -(-V // most)) if V else 1  # as many chunks, of equal size
    return Sizes(rows, min(most, -(-equal // 16) * 16))


@cache
def _processors(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.L2_cache_size


@cache
def _whole_waves(rows: int, V: int, most: int, processors: int, cache_bytes: int) -> int:
    """Choose the words of a chunk, at most ``most``, so that the GPU is busy.

    A launch costs a tenth of a wave, so chunks should be few; the tiles of their GEMMs should fill the processors in
    whole waves; and the float32 logits should fit in half of the cache, where the next kernel finds them.
    """
    most = min(most, max(TILE_WORDS, cache_bytes // (8 * rows)))
    if most < TILE_WORDS or most >= V:
        return min(most, V)
    tall = -(-rows // TILE_ROWS)

    def waves(tiles: int) -> float:
        chunks, rest = divmod(V, tiles * TILE_WORDS)
        whole = 0.1 + -(-tall * tiles // processors)
        return chunks * whole + (rest > 0) * (0.1 + -(-tall * -(-rest // TILE_WORDS) // processors))

    return TILE_WORDS * min(range(1, most // TILE_WORDS + 1), key=waves)


class Chunks:
    """Logits of one chunk of the vocabulary after the other, in one buffer if the product does not allocate its own."""

    def __init__(self, lm_head: Tensor, bias: Tensor | None, sizes: Sizes) -> None:
        self.lm_head, self.words = lm_head, sizes.words
        self.dtype, self.sum_dtype = product_dtype(lm_head), sum_dtype(lm_head.dtype)
        self.bias = None if bias is None else bias.to(self.sum_dtype)
        self.logits = None
        if lm_head.device.type != "cpu" or self.dtype != self.sum_dtype:
            aligned = -(-sizes.words // 16) * 16  # rows begin at multiples of 64 bytes
            self.logits = lm_head.new_empty(sizes.rows, aligned, dtype=self.sum_dtype)
        upcast = (sizes.words, lm_head.shape[1]) if self.dtype != lm_head.dtype else (0,)
        self.upcast = lm_head.new_empty(upcast, dtype=self.dtype)

    def __call__(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
        """Yield (words, their rows of lm_head, logits, bias) for rows ``hidden`` in the dtype of the product."""
        V = self.lm_head.shape[0]
        for first in range(0, V, self.words):
            here = slice(first, min(first + self.words, V))
            rows = self.lm_head[here]
            if rows.dtype != self.dtype:
                rows = self.upcast[: len(rows)].copy_(rows)
            out = None if self.logits is None else self.logits[: len(hidden), : len(rows)]
            yield here, rows, multiply_rows(hidden, rows, out), None if self.bias is None else self.bias[here]

    def kept(self, logits: Tensor) -> Tensor:
        """View what a primitive wrote over ``logits``, in the dtype of the product; it begins where each row does."""
        return logits if self.dtype == logits.dtype else logits.view(self.dtype)[:, : logits.shape[1]]


@implement("token_log_likelihood")
def _forward(hidden, lm_head, target_ids, bias, soft_cap, logit_scale, chunk_bytes, want_expectation):
    """Accumulate the log-sum-exp over chunks of the vocabulary.

    For the gradient it also sums E = sum_v p_v dz_v/du_v lm_head[v], rescaled as the maximum grows, so that the
    backward pass is one multiplication: d log p / d hidden = logit_scale * (dz/du lm_head[target] - E).
    """
    check_ids("token_log_likelihood", "target_ids", target_ids, lm_head.shape[0], "V")
    ops, dtype, (N, D) = torch.ops.qpeft_ext, sum_dtype(hidden.dtype), hidden.shape
    log_p, lse = hidden.new_empty(N, dtype=dtype), hidden.new_empty(N, dtype=dtype)
    expectation = hidden.new_zeros((N, D) if want_expectation else (0,), dtype=dtype)
    sizes = _sizes(hidden, lm_head, chunk_bytes, D * dtype.itemsize if want_expectation else 0)
    chunks = Chunks(lm_head, bias, sizes)
    target_ids = target_ids.contiguous()
    with exact_float32(hidden):
        for begin in range(0, N, sizes.rows):
            block = slice(begin, begin + sizes.rows)
            some, targets = hidden[block].to(chunks.dtype), target_ids[block]
            sums = expectation[block] if want_expectation else None
            running = hidden.new_full((3, len(some)), -torch.inf, dtype=dtype)
            running[1] = 0
            for here, rows, logits, some_bias in chunks(some):
                ops.token_log_likelihood_chunk(
                    logits, some_bias, targets, here.start, logit_scale, soft_cap, running, sums, chunks.dtype
                )
                if sums is not None:
                    add_product(sums, chunks.kept(logits), rows)
                del logits  # their memory serves the next chunk
            ops.token_log_likelihood_finish(
                running, lm_head, targets, logit_scale, soft_cap, log_p[block], lse[block], sums
            )
    return log_p, lse, expectation


@fake("token_log_likelihood")
def _(hidden, lm_head, target_ids, bias, soft_cap, logit_scale, chunk_bytes, want_expectation):
    N, dtype = hidden.shape[0], sum_dtype(hidden.dtype)
    shape = hidden.shape if want_expectation else (0,)
    return hidden.new_empty(N, dtype=dtype), hidden.new_empty(N, dtype=dtype), hidden.new_empty(shape, dtype=dtype)


@implement("token_log_likelihood_backward")
def _backward(grad_log_p, lse, hidden, lm_head, target_ids, bias, soft_cap, logit_scale, chunk_bytes):
    """Compute the gradients of lm_head and bias from the same chunks, with all rows at once."""
    dtype, N = sum_dtype(hidden.dtype), hidden.shape[0]
    grad_lm_head = torch.empty_like(lm_head)
    grad_bias = None if bias is None else torch.empty_like(bias)
    grad_log_p, target_ids = grad_log_p.to(dtype).contiguous(), target_ids.contiguous()
    sizes = _sizes(hidden, lm_head, chunk_bytes, 0)
    chunks = Chunks(lm_head, bias, Sizes(N, max(1, sizes.rows * sizes.words // max(1, N))))
    hidden = hidden.to(chunks.dtype)
    with exact_float32(hidden):
        for here, _, logits, some_bias in chunks(hidden):
            torch.ops.qpeft_ext.token_log_likelihood_chunk_backward(
                logits, some_bias, target_ids, here.start, logit_scale, soft_cap, lse, grad_log_p, chunks.dtype
            )
            grad_logits, grad = chunks.kept(logits), grad_lm_head[here]
            if grad.dtype == chunks.dtype:
                torch.addmm(grad, grad_logits.T, hidden, beta=0, alpha=logit_scale, out=grad)
            else:
                grad.copy_(logit_scale * (grad_logits.T @ hidden))
            if grad_bias is not None:
                grad_bias[here] = grad_logits.sum(0, dtype=dtype)
            del logits, grad_logits
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
