"""Compute what follows the last attention only for the rows that the head reads.

The head reads the rows before query tokens, 16 of the 40 of a usual suffix. What an LM runs after it has stored the
keys of its last layer (output projection, feed-forward) makes each row from that row only, so the others are left out.
So are the last layer's queries, where they have a projection of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.hardware import few_heights, shape_step


class RowPicker:
    """Forward hooks for modules that read one tensor [B, L, n] or [B·L, n] and compute each row from that row only.

    With `pick` before and `put_back` after its forward, a module computes some rows; the others come out as zeros.

    Args:
        rows: flat indices into [B·L] of the rows to compute, int64 [N], each once.
        shape: (B, L).
    """

    def __init__(self, rows: Tensor, shape: tuple[int, int]) -> None:
        self.rows, self.shape = rows, shape
        self._filled_up = torch.cat([rows, rows[-1:].expand(few_heights(len(rows)) - len(rows))])

    def pick(self, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        """The rows of the module's input, [1, N, n] or [N, n]."""
        x = inputs[0]
        # the last row several times where each new shape takes time
        rows = self.rows if shape_step(x.device, x.dtype) == 1 else self._filled_up
        picked = x.reshape(-1, x.shape[-1]).index_select(0, rows.to(x.device))
        return (picked.view(*(1,) * (x.dim() - 2), *picked.shape),)

    def put_back(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """The module's output for all rows, [B, L, m] or [B·L, m]: zeros where it was not computed."""
        width = output.shape[-1]
        whole = output.new_zeros(self.shape[0] * self.shape[1], width)
        whole = whole.index_copy(0, self.rows.to(output.device), output.reshape(-1, width)[: len(self.rows)])
        return whole.view(*self.shape, width) if inputs[0].dim() == 3 else whole
