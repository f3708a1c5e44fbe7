"""Where keys and values in a file come from, as the file says it: one in the place of another is not read."""

from __future__ import annotations

import json


class OtherOrigin(ValueError):
    """A file is not of the LM that is expected, or computed in another way."""


def origin_of(fingerprint: dict[str, str], deterministic: bool, kv_dtype: str | None = None) -> dict[str, str]:
    """Make the metadata of a file.

    Args:
        fingerprint: of the LM.
        deterministic: whether each prefix is computed unpadded, in a pass of its own.
        kv_dtype: the dtype in which they are stored, where that is not the LM's own.
    """
    stored_as = {"kv_dtype": kv_dtype} if kv_dtype else {}
    return {"fingerprint": json.dumps(fingerprint), "alone": str(deterministic)} | stored_as


def expect_origin(metadata: dict[str, str], fingerprint: dict[str, str], deterministic: bool) -> None:
    """Check that a file is of an LM, and computed in the way that is expected; each `Extent` says its dtype.

    Args:
        metadata: of the file.
        fingerprint, deterministic: as for `origin_of`.
    Raises: OtherOrigin if it is not.
    """
    try:
        lm = json.loads(metadata["fingerprint"])
    except (KeyError, TypeError, ValueError, RecursionError):
        lm = None
    if lm != fingerprint:
        raise OtherOrigin("it is of another LM")
    if metadata.get("alone") != str(deterministic):
        raise OtherOrigin(f"it was made {'without' if deterministic else 'with'} deterministic=True")
