"""Parts that the operators share: registration of their Python kernels, products, blocks of table rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from ._library import registered
from .hardware import _has_onednn, few_heights, has_bfloat16_products

BLOCK_BYTES = 2 << 20  # of rows gathered at a time: 128 of 4096 float32, which stay in the cache for the GEMM


def implement(name: str, keys: str | tuple[str, ...] = ("cpu", "cuda")):
    """Return a decorator that makes a function the kernel of ``qpeft_ext::name``, if the library is loaded."""

    def register(function):
        if registered():
            torch.library.impl(f"qpeft_ext::{name}", keys, function)
        return function

    return register


def fake(name: str):
    """Return a decorator for the function that tells torch.compile the shapes and dtypes of ``qpeft_ext::name``."""
    return torch.library.register_fake(f"qpeft_ext::{name}") if registered(name) else lambda function: function


def differentiable(name: str, setup_context, backward) -> None:
    """Register ``backward`` for ``qpeft_ext::name``. Differentiating it again raises RuntimeError."""
    backward = outside_autocast(backward)  # whoever calls loss.backward() may be inside of it

    def first_order(ctx, *grads):
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():  # create_graph=True
            results = backward(ctx, *grads)
        depends_on = (x for x in (*ctx.saved_tensors, *grads) if x is not None and x.requires_grad)
        return _FirstOrder.apply(name, results, *depends_on)

    if registered(name):
        torch.library.register_autograd(f"qpeft_ext::{name}", first_order, setup_context=setup_context)


class _FirstOrder(torch.autograd.Function):
    """Pass gradients through, connected to the tensors they depend on, with a backward that raises.

    torch's `once_differentiable` does not connect them, so `torch.autograd.grad` would treat them as constants.
    """

    @staticmethod
    def forward(ctx, op: str, grads: tuple[Tensor | None, ...], *depends_on: Tensor) -> tuple[Tensor | None, ...]:
        ctx.op = op
        return grads

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"{ctx.op}: a gradient cannot be differentiated again; with QPEFT_REFERENCE=1 the PyTorch "
            "definitions run, which have second derivatives"
        )


def refuse_transforms(op: str, *inputs: Tensor | None) -> None:
    """Raise NotImplementedError for an input by which `torch.func.jvp`, `jacfwd`, `grad`, `vjp` or `jacrev` differs.

    torch would ignore a tangent, and refuses a `torch.func.grad` over registered operators with words about its own
    classes.
    """
    if forward_ad._current_level >= 0 and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs
    ):
        raise NotImplementedError(
            f"{op}: there is no forward-mode derivative; with QPEFT_REFERENCE=1 the PyTorch "
            "definitions run, which have it"
        )
    if torch._C._are_functorch_transforms_active() and any(
        _functorch.is_gradtrackingtensor(layer) and layer.requires_grad for x in inputs for layer in _layers(x)
    ):
        raise NotImplementedError(
            f"{op}: there is no derivative by torch.func; use backward() or torch.autograd.grad, or set "
            "QPEFT_REFERENCE=1, with which the PyTorch definitions run"
        )


def needs_gradient(x: Tensor) -> bool:
    """Return whether a gradient by ``x`` is recorded, also where `torch.func.vmap` has wrapped it."""
    if not torch.is_grad_enabled():
        return False
    if not torch._C._are_functorch_transforms_active():
        return x.requires_grad
    return any(layer.requires_grad for layer in _layers(x))


def _layers(x: Tensor | None) -> Iterator[Tensor]:
    """Yield ``x`` and, inside of transforms of `torch.func`, the tensors that it wraps."""
    while x is not None:
        yield x
        x = _functorch.get_unwrapped(x) if _functorch.is_functorch_wrapped_tensor(x) else None


def refuse_gradient(op: str, **inputs: Tensor) -> None:
    """Raise ValueError for an input that asks for a gradient which the operator does not compute."""
    for name, x in inputs.items():
        if needs_gradient(x):
            raise ValueError(f"{op}: {name} gets no gradient, so it must not ask for one")


def with_plain_rows(table: Tensor) -> Tensor:
    """Return the table, or a copy if the numbers of a row are not adjacent or rows overlap: kernels read whole rows."""
    V, D = table.shape
    plain = (D <= 1 or table.stride(1) == 1) and (V <= 1 or table.stride(0) >= D)
    return table if plain else table.contiguous()


def outside_autocast(function: Callable) -> Callable:
    """Return a function that runs without `torch.autocast`, so that it computes the same inside and outside of it."""

    @wraps(function)
    def run(*args, **kwargs):
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return run(*args, **kwargs)
        return function(*args, **kwargs)

    return run


# ---- documents as rows of a table ------------------------------------------------------------------------------------


def rows_of(table: Tensor, document_ids: Tensor, document_mask: Tensor) -> Tensor:
    """Return the documents' rows, ``[B, S, D]``, with zeros where the mask is False; the definitions use it."""
    return table[document_ids.where(document_mask, 0)].masked_fill(~document_mask[:, :, None], 0)


class DocumentRows(NamedTuple):
    """The distinct ids of each group of pairs and of each document (`document_rows_distinct` in csrc/ops.cpp)."""

    rows: Tensor  # [U] int64, group after group
    offsets: list[int]  # [G + 1]: where each group begins
    ids: Tensor  # [B, S] int64: distinct ids of the document by first position, then -1
    slots: Tensor  # [B, S] int32: their places in rows, then -1
    counts: Tensor  # [B, S] int32: how often each occurs, then 0
    lengths: list[int]  # [B]: how many there are


def distinct_rows(document_ids: Tensor, document_mask: Tensor, group: Tensor, groups: int, size: int) -> DocumentRows:
    """Find the distinct ids of documents [B, S] in ``groups`` groups; ``size``: rows of the table."""
    rows, offsets, ids, slots, counts, lengths = torch.ops.qpeft_ext.document_rows_distinct(
        document_ids.contiguous(), document_mask.contiguous(), group.contiguous(), groups, size
    )
    begins = offsets.tolist()  # on a GPU this would wait
    return DocumentRows(rows[: begins[-1]], begins, ids, slots, counts, lengths.tolist())


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def block_dtype(table: Tensor) -> torch.dtype:
    """Return the dtype of gathered rows: on CUDA that of the table, on the CPU that of sums."""
    return sum_dtype(table.dtype) if table.device.type == "cpu" else table.dtype


def product_dtype(rows: Tensor) -> torch.dtype:
    """Return the dtype in which rows are multiplied in place: bf16 on a CPU too, if it has fast products of bf16."""
    even = rows.is_contiguous() and rows.shape[-1] % 2 == 0
    if rows.dtype == torch.bfloat16 and even and rows.device.type == "cpu" and has_bfloat16_products():
        return rows.dtype
    return block_dtype(rows)


def multiply(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``a @ b`` in the dtype of sums, not rounded to that of the inputs; in ``out`` if it is given."""
    if a.dtype == sum_dtype(a.dtype):
        return torch.matmul(a, b, out=out)
    return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=torch.float32, out=out)


def multiply_rows(a: Tensor, rows: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``a @ rows.T`` of two matrices in the dtype of sums; ``out``: memory that it may use.

    float32 on the CPU goes through oneDNN, which reads both in place; the sgemm of MKL, which `torch.mm` calls, copies
    them into panels first. GFLOP/s on 2 threads, oneDNN and MKL: 162 and 93 for [160, 512] by [8000, 512], 178 and 161
    for [1600, 4096] by [8000, 4096], 158 and 93 for [128256, 4096] by [16, 4096].

    oneDNN keeps compiled code for each of the last 1,024 shapes, so ``a`` is padded to one of few heights: otherwise
    batches of varying sizes make the process grow (by 30 MB in 1,400 pairs).

    bf16 on the CPU (see `product_dtype`) goes through csrc/cpu/bfloat16_products.cpp, since torch's product rounds its
    result to bf16.
    """
    if a.device.type == "cpu" and a.dtype == torch.bfloat16:
        out = a.new_empty(len(a), len(rows), dtype=torch.float32) if out is None else out
        torch.ops.qpeft_ext.bfloat16_products(a.contiguous(), rows, out)
        return out
    exact = a.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    if a.device.type == "cpu" and exact and a.numel() > 0 and _has_onednn():
        height = len(a)
        if (missing := few_heights(height) - height) > 0:
            a = torch.nn.functional.pad(a, (0, 0, 0, missing))
        return torch.ops.mkldnn._linear_pointwise(a, rows, None, "none", [], "")[:height]
    return multiply(a, rows.T, out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a @ b`` to ``total``, which has the dtype of sums, inside the GEMM; matrices, or batches of them."""
    add = torch.addmm if a.dim() == 2 else torch.baddbmm
    if a.device.type == "cpu" and a.dtype == torch.bfloat16:
        torch.ops.qpeft_ext.bfloat16_add_product(total, a, b)
    elif a.dtype == total.dtype:
        add(total, a, b, out=total)
    else:
        add(total, a, b, out_dtype=total.dtype, out=total)


@contextmanager
def exact_float32(x: Tensor) -> Iterator[None]:
    """Do not round float32 products on the device of ``x`` to tf32 inside this context; then restore the setting."""
    setting = torch.backends.cuda.matmul
    if x.device.type != "cuda" or x.dtype != torch.float32 or setting.fp32_precision != "tf32":
        yield
        return
    setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = "none"  # inherited from torch.backends.fp32_precision
        if setting.fp32_precision != "tf32":
            setting.fp32_precision = "tf32"  # it was set here, by this name or by allow_tf32


def budget(cpu_bytes: int, table: Tensor) -> int:
    """Return the bytes of a buffer: on the CPU what fits in its caches, on a GPU more, since launches cost time."""
    return cpu_bytes if table.device.type == "cpu" else 16 * cpu_bytes


def rows_per_block(D: int, dtype: torch.dtype, size: int) -> int:
    """Return how many rows of D numbers fit in ``size`` bytes, at least 1."""
    return max(1, size // max(D * dtype.itemsize, 1))


def blocks_of_rows(
    table: Tensor, rows: Tensor, begin: int, end: int, norms: bool = False
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Gather ``table[rows[begin:end]]`` in blocks, in one buffer; yield (place in rows, [n, D], 1 / norm or None)."""
    most = rows_per_block(table.shape[1], block_dtype(table), budget(BLOCK_BYTES, table))
    size = min(most, max(end - begin, 1))
    buffer = table.new_empty(size, table.shape[1], dtype=block_dtype(table))
    inverse = table.new_empty(size, dtype=sum_dtype(table.dtype)) if norms else None
    for first in range(begin, end, size):
        here = slice(first, min(first + size, end))
        n = here.stop - here.start
        inverse_norms = None if inverse is None else inverse[:n]
        torch.ops.qpeft_ext.document_rows_gather(table, rows[here], buffer[:n], inverse_norms)
        yield here, buffer[:n], inverse_norms
