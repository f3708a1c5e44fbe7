"""Which of torch's attention kernels the LM's passes may use on a GPU."""

from __future__ import annotations

import torch

from ..utils.torch_state import SharedSetting

_cudnn_attention = SharedSetting(torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp, False)
