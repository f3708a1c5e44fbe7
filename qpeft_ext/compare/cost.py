"""What a method costs: memory at its peak, tokens that the LM reads, and floating-point operations."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from torch import nn

from ..utils.memory import return_freed_memory

PETA = 1e15


class PeakMemory:
    """Bytes that a block of work needed at its peak beyond what was held before it: ``bytes``, None if unknown.

    On a CUDA device the allocator's count. On the CPU the resident memory of the whole process, by Linux's own
    high-water mark (VmHWM, set back at the start): it counts everything, Python included, in pages.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = torch.device(device), None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return self
        return_freed_memory(0)  # or pages that an earlier method freed would hide what this one takes
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _status("VmRSS")
        except OSError:
            self._before = None
        return self

    def __exit__(self, *error) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        elif self._before is not None:
            self.bytes = max(0, _status("VmHWM") - self._before)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


class Work:
    """Counts what an LM reads while the block runs: padding does not count, prefixes that come from a cache neither.

    tokens: read by the decoder.  attended: pairs (token, token that it attends to), itself included.
    """

    def __init__(self, engine) -> None:
        self.engine, self.tokens, self.attended = engine, 0, 0

    def __enter__(self) -> Work:
        self._hook = self.engine.decoder.register_forward_pre_hook(self._count, with_kwargs=True)
        return self

    def __exit__(self, *error) -> None:
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

    def flops(self, head_rows: int) -> float:
        """2·N·tokens + 4·L·d·attended + 2·D·V·head_rows: the closed form of E2R-FLOPs (arXiv 2507.06223) with true
        lengths, causal attention, and the LM head on the rows that it ran on.

        N: parameters of the decoder without its embeddings, adapters in it included (of a mixture of experts all of
        them).  L, d: layers, heads × head width.  Clue modules are not counted: a few per cent.
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
