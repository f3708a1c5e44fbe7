"""The dtypes in which keys and values may be stored, by their names."""

from __future__ import annotations

import torch

KV_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}


def expect_kv_dtype(kv_dtype: object, name: str) -> None:
    """Check the name of a dtype for keys and values; None, for the LM's own, is right too.

    Args:
        kv_dtype: what is checked.
        name: of the option, for the error.
    Raises: ValueError for any other.
    """
    if kv_dtype is not None and not (isinstance(kv_dtype, str) and kv_dtype in KV_DTYPES):
        raise ValueError(
            f"{name} must be one of {', '.join(KV_DTYPES)}, got {kv_dtype!r}; leave it out for the LM's own dtype"
        )
