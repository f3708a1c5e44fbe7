"""Which of torch's attention kernels the LM's passes may use on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..utils.torch_state import SharedSetting

_cudnn_attention = SharedSetting(torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp, False)


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Inside, `scaled_dot_product_attention` does not take cuDNN's kernels; the user's setting comes back after.

    torch 2.11 and later prefer them on H100, H200 and B200. With an attention mask their backward returns NaN for some
    lengths (pytorch/pytorch issue 196678), and rows that attend to nothing, which left padding makes, may be NaN. With
    them a soft prompt or LoRA, whose gradient goes through left-padded prefixes, was NaN after 5 to 44 steps.

    The backward pass takes the kernel that belongs to the forward's. It is a setting of the process, as torch has no
    other: passes of several threads share it, and the last of them gives it back. Also a decorator.
    """
    with _cudnn_attention.inside():
        yield
