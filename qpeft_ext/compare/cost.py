"""Measurement of what a method costs: peak memory, tokens that the LM reads, and floating-point operations."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from torch import nn

from ..engine.base import BaseEngine
from ..utils.memory import return_freed_memory

PETA = 1e15


class PeakMemory:
    """Context manager that measures the peak memory of the work in it, beyond what was in use before.

    On a CUDA device that is the allocator's count. On a CPU it is the resident memory of the whole process, from
    Linux's high-water mark (VmHWM), which is set back at the start.

    Attributes:
        bytes: the peak, after the block; None where it is not known.
    """

    bytes: int | None = None
    _before: int | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device(device)

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return self
        return_freed_memory(0)  # else pages that an earlier method freed would hide what this one takes
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _status("VmRSS")
        except OSError:  # not Linux, or not allowed
            pass
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is None:
            return
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        else:
            self.bytes = max(0, _status("VmHWM") - self._before)


def _status(name: str) -> int:
    """Return a size of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


class Work:
    """Context manager that counts what the LM of an engine reads, without padding and without cached prefixes.

    Attributes:
        tokens: tokens that the decoder read.
        attended: pairs of a token and a token that it attended to, itself included.
    """

    def __init__(self, engine: BaseEngine) -> None:
        self.engine, self.tokens, self.attended = engine, 0, 0

    def __enter__(self) -> Work:
        self._hook = self.engine.decoder.register_forward_pre_hook(self._count, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _count(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        read = kwargs.get("input_ids")
        read = kwargs["inputs_embeds"] if read is None else read
        B, L = read.shape[:2]
        mask = kwargs.get("attention_mask")
        mask = read.new_ones(B, L, dtype=torch.long) if mask is None else mask
        new, there = mask[:, -L:].sum(1), mask.sum(1)
        self.tokens += int(new.sum())
        self.attended += int((new * (there - new) + new * (new + 1) // 2).sum())

    def flops(self, head_rows: float) -> float:
        """Compute the floating-point operations of what was read: 2·N·tokens + 4·L·d·attended + 2·D·V·head_rows.

        This is the closed form of E2R-FLOPs with true lengths and causal attention. N is the number of the decoder's
        parameters without embeddings, with adapters and all experts; L the number of layers; d the number of heads
        times their width; D the hidden size; V the vocabulary. Clue modules, a few per cent, are not counted.

        Args:
            head_rows: rows that the LM head ran on; of a row with few words of the table, its share.

        Source: arXiv 2507.06223.
        """
        lm, decoder = self.engine.lm, self.engine.decoder
        config = lm.config.get_text_config()
        embeddings = {
            id(p) for module in decoder.modules() if isinstance(module, nn.Embedding) for p in module.parameters()
        }
        N = sum(p.numel() for p in decoder.parameters() if id(p) not in embeddings)
        heads = getattr(config, "num_attention_heads", 0)  # none where the LM has recurrent state instead
        width = heads and heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        V, D = self.engine.table.shape
        attention = 4 * config.num_hidden_layers * width * self.attended
        return 2.0 * N * self.tokens + attention + 2.0 * D * V * head_rows
