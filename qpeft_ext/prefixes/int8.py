"""Keys and values in 8 bits, with scales in float32: a quarter of the bytes of float32, half of those of bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST = 127


class Int8Tensor:
    """Keys or values of one layer of one prefix in 8 bits: x ≈ scale · data + middle.

    Keys have a scale and a middle for each head and channel, because a few channels of keys are far from zero and much
    larger than the others, in all tokens alike. Values have a scale for each token and no middle.

    Args:
        data: int8 [1, heads, P, head width], from −127 to 127.
        scale: float32 [1, heads, 1, head width], or [1, 1, P, 1].
        middle: float32, as ``scale``; None: zero.
    Attributes:
        shape, device, dtype: those of ``data``.
    """

    def __init__(self, data: Tensor, scale: Tensor, middle: Tensor | None) -> None:
        self.data, self.scale, self.middle = data, scale, middle
        self.shape, self.device, self.dtype = data.shape, data.device, data.dtype

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes + (0 if self.middle is None else self.middle.nbytes)

    def copy_(self, x: Tensor) -> None:
        """Round ``x`` [1, heads, P, head width] into the memory of this one. A NaN or an infinity stays visible."""
        x = x.float()
        if self.middle is None:
            half = x.abs().amax((1, 3), keepdim=True)
        else:
            low, high = x.amin(2, keepdim=True), x.amax(2, keepdim=True)
            self.middle.copy_(low / 2 + high / 2)
            half = high / 2 - low / 2
            x = x - self.middle
        self.scale.copy_(half / _LARGEST)
        steps = x / self.scale.clamp_min(torch.finfo(torch.float32).tiny)
        self.data.copy_(steps.round_().clamp_(-_LARGEST, _LARGEST))

    def read_into(self, out: Tensor) -> None:
        """Write the numbers to ``out``, of any floating dtype and the shape of this one."""
        x = out if out.dtype == torch.float32 else torch.empty(out.shape, device=out.device)
        x.copy_(self.data).mul_(self.scale)  # in place: the numbers of a layer stay in the processor's cache
        if self.middle is not None:
            x.add_(self.middle)
        if x is not out:
            out.copy_(x)


def int8_bytes(heads: int, slots: int, key_width: int, value_width: int) -> int:
    """Bytes of the keys and values of a layer, with their scales, up to a whole number of float32."""
    return 4 * (2 * heads * key_width + slots) + -(-heads * slots * (key_width + value_width) // 4) * 4


def int8_views(
    block: Tensor, heads: int, slots: int, key_width: int, value_width: int
) -> tuple[Int8Tensor, Int8Tensor]:
    """Keys and values of a layer in ``block``, int8 [int8_bytes(…)]: first the scales, then the numbers."""
    of_keys = heads * key_width
    numbers = 4 * (2 * of_keys + slots)
    scales, end = block[:numbers].view(torch.float32), numbers + of_keys * slots
    scale, middle = (part.view(1, heads, 1, key_width) for part in (scales[:of_keys], scales[of_keys : 2 * of_keys]))
    keys = block[numbers:end].view(1, heads, slots, key_width)
    values = block[end : end + heads * slots * value_width].view(1, heads, slots, value_width)
    return Int8Tensor(keys, scale, middle), Int8Tensor(values, scales[2 * of_keys :].view(1, 1, slots, 1), None)
