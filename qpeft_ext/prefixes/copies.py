"""Copies between a GPU and pinned memory, beside the passes."""

from __future__ import annotations

import torch
from torch import Tensor

from .kv import Packing, PrefixKV


class Copies:
    """Copies of prefixes between one device and the host.

    On CUDA they are asynchronous, through pinned memory, on two streams of their own, so that they run beside the
    passes: the CPU is usually a group of prefixes ahead of the device. On other devices there is nothing to copy. Only
    a GPU can show that the streams wait for each other as they must; the test for that is marked ``cuda``.

    Args:
        device: the model's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        if self.cuda:
            self._up, self._down = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._staging = torch.empty(0, dtype=torch.uint8)
        self._staging_read: torch.cuda.Event | None = None

    def to_host(self, prefix: PrefixKV) -> PrefixKV:
        """A copy in pinned memory, which the CPU may read after its event ``ready``; itself if it is there already."""
        block = prefix.block
        if not block.is_cuda:
            return prefix
        current = torch.cuda.current_stream(self.device)
        flat = torch.empty(block.shape, dtype=block.dtype, pin_memory=True)
        self._down.wait_stream(current)  # the pass that computes the prefix
        with torch.cuda.stream(self._down):
            flat.copy_(block, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        block.record_stream(self._down)  # its memory is not used anew before that
        host = Packing.of(prefix).unpack(flat, *prefix.lengths)
        host.ready = ready
        return host

    def to_device(self, prefix: PrefixKV) -> PrefixKV:
        """A copy on the device that the current stream may read; itself if nothing is to be copied."""
        if not self.cuda:
            return prefix
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._up):
            if prefix.ready is not None:
                self._up.wait_event(prefix.ready)
            flat = prefix.block.to(self.device, non_blocking=True)
        current.wait_stream(self._up)
        flat.record_stream(current)
        return Packing.of(prefix).unpack(flat, *prefix.lengths)

    def staging(self, nbytes: int) -> Tensor:
        """Host memory to read files into, uint8 [nbytes]; valid until the next call."""
        if self._staging_read is not None:
            self._staging_read.synchronize()
        if self._staging.numel() < nbytes:
            self._staging = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.cuda)
        return self._staging[:nbytes]

    def staging_is_read(self) -> None:
        """Say that all copies from `staging` have been started."""
        if self.cuda:
            self._staging_read = torch.cuda.Event()
            self._staging_read.record(self._up)


_COPIES: dict[torch.device, Copies] = {}


def copies(device: torch.device) -> Copies:
    """The `Copies` of a device, which all caches share."""
    if device not in _COPIES:
        _COPIES[device] = Copies(device)
    return _COPIES[device]
