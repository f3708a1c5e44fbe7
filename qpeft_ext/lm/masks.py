"""The attention masks of a pass, read once and not in every layer."""

from __future__ import annotations

import torch
from torch import Tensor


class Mask:
    """A mask of a pass on a CPU.

    Args:
        mask: bool or added to the scores, [B or 1, 1, L, S].
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.starts = _starts(mask)
        self._added: Tensor | None = None

    def starts_of(self, B: int) -> list[int] | None:
        """Where the text of each of B rows begins (`_starts`); a mask of one row is that of all. None: unknown."""
        return self.starts * B if self.starts is not None and len(self.starts) < B else self.starts

    def added(self, dtype: torch.dtype) -> Tensor:
        """Return the mask as numbers that are added to the scores, which torch makes of a bool one in every layer."""
        if self.mask.dtype != torch.bool:
            return self.mask
        if self._added is None or self._added.dtype != dtype:
            self._added = torch.zeros(self.mask.shape, dtype=dtype).masked_fill_(~self.mask, float("-inf"))
        return self._added


class KnownMasks:
    """The masks of the pass that runs; an LM with sliding windows has two."""

    def __init__(self) -> None:
        self._known: dict[int, Mask] = {}

    def of(self, mask: Tensor) -> Mask:
        """Return the known form of ``mask``, which is read if it is new."""
        known = self._known.get(id(mask))
        if known is None:
            known = self._known[id(mask)] = Mask(mask)  # keeps the tensor, so no other one has its id meanwhile
        return known

    def forget(self) -> None:
        """Forget all masks, at the end of a pass."""
        self._known.clear()


def _starts(mask: Tensor) -> list[int] | None:
    """Find where each row's text begins, if every token of it sees itself and all before it, and nothing else.

    The queries are the last tokens of the text, with padding before it or after it. What padding sees does not matter,
    except that padding before the text does not see itself: a query that does is text of an earlier chunk.

    Args:
        mask: as for `Mask`.
    Returns: a place for each row; None for any other mask.
    """
    _, _, L, S = mask.shape
    if mask.dtype != torch.bool or L > S:
        return None
    slots, own = torch.arange(S), torch.arange(S - L, S)  # of keys, and of the queries
    last = mask[:, 0, -1]  # sees all text, padding behind it too
    first = last.int().argmax(1)
    is_text = mask[:, 0].diagonal(S - L, 1, 2)
    causal = (slots <= own[:, None]) & (slots >= first[:, None, None])
    same = (mask[:, 0] == causal) | ~is_text[:, :, None]
    return first.tolist() if bool(same.all()) and bool(last.any(1).all()) else None
