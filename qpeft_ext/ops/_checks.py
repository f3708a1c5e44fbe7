"""Check the arguments of the operators, and say in the user's words what is wrong."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _functorch


def expect_shape(op: str, name: str, x: Tensor, words: str, shape: tuple[int | None, ...]) -> None:
    """Raise ValueError unless ``x`` has this shape; None allows any size, and ``words`` is the shape in letters."""
    if x.dim() != len(shape) or any(size is not None and size != got for size, got in zip(shape, x.shape, strict=True)):
        known = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{op}: {name} must have shape {words} = [{known}], got {list(x.shape)}")


def expect_dtype(op: str, name: str, x: Tensor, dtype: torch.dtype) -> None:
    if x.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {_word(dtype)}, got {_word(x.dtype)}")


def expect_like(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """Raise unless ``x`` has the dtype of ``like``, which must be floating (TypeError), and its device (ValueError)."""
    if not like.is_floating_point():
        raise TypeError(f"{op}: {like_name} must be floating, got {_word(like.dtype)}")
    if x.dtype != like.dtype:
        raise TypeError(f"{op}: {name} must have the dtype of {like_name}, {_word(like.dtype)}, got {_word(x.dtype)}")
    expect_device(op, name, x, like_name, like)


def expect_device(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{op}: {name} must be on the device of {like_name}, {like.device}, got {x.device}")


def check_documents(
    op: str,
    query_embeds: Tensor,
    query_mask: Tensor,
    table: Tensor,
    document_ids: Tensor,
    document_mask: Tensor,
    query_index: Tensor,
) -> None:
    """Check the inputs that `similarity_topk` and `clue_attention` have in common."""
    expect_shape(op, "table", table, "[V, D]", (None, None))
    expect_shape(op, "query_embeds", query_embeds, "[Q, T, D]", (None, None, table.shape[1]))
    expect_shape(op, "query_mask", query_mask, "[Q, T]", tuple(query_embeds.shape[:2]))
    expect_shape(op, "document_ids", document_ids, "[B, S]", (None, None))
    expect_shape(op, "document_mask", document_mask, "[B, S]", tuple(document_ids.shape))
    expect_shape(op, "query_index", query_index, "[B]", (document_ids.shape[0],))
    expect_like(op, "query_embeds", query_embeds, "table", table)
    expect_dtype(op, "document_ids", document_ids, torch.int64)
    expect_dtype(op, "query_index", query_index, torch.int64)
    for name, mask in (("query_mask", query_mask), ("document_mask", document_mask)):
        expect_dtype(op, name, mask, torch.bool)
        expect_device(op, name, mask, "table", table)
    for name, ids in (("document_ids", document_ids), ("query_index", query_index)):
        expect_device(op, name, ids, "table", table)


def check_ids(op: str, name: str, ids: Tensor, size: int, size_name: str, mask: Tensor | None = None) -> None:
    """Raise IndexError for an unmasked id outside [0, size). CUDA would have to wait for this; its kernels check."""
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = (ids < 0) | (ids >= size)
    if mask is not None:
        wrong = wrong & mask  # not in place: `torch.func.vmap` may map the mask alone
    if anywhere(wrong):
        if _functorch.is_functorch_wrapped_tensor(wrong):
            raise IndexError(f"{op}: an id of {name} is outside [0, {size_name}) = [0, {size})")
        at = wrong.nonzero()[0].tolist()
        raise IndexError(f"{op}: {name}{at} = {int(ids[tuple(at)])} is outside [0, {size_name}) = [0, {size})")


def anywhere(condition: Tensor) -> bool:
    """Tell whether a condition is true in any place, inside of `torch.func.vmap` in any of its examples."""
    if torch._C._are_functorch_transforms_active():
        while _functorch.is_functorch_wrapped_tensor(condition):
            condition = _functorch.get_unwrapped(condition)
    return bool(condition.any())


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
