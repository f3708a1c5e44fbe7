"""Log-likelihoods of several queries that share one document prefix in a single row."""

from __future__ import annotations

import numpy as np
import torch
from transformers import LlamaForCausalLM

SHAPE_STEP = 64  # rows of a product are filled up to a multiple: oneDNN makes and keeps code for each new number


def hidden_states(model: LlamaForCausalLM, rows: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Final hidden states of prompt rows, [B, S, D], their ids and is_query, [B, S]; each suffix sees only the prefix
    and itself."""
    length = _filled_up(max(len(row[0]) for row in rows))
    ids, segments, positions, is_query = (
        torch.from_numpy(np.stack([np.pad(r[part], (0, length - len(r[part])), constant_values=fill) for r in rows]))
        for part, fill in enumerate((0, -1, 0, False))
    )
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    visible = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])  # [B, S, S]
    mask = torch.zeros(visible.shape).masked_fill(~(visible & causal), torch.finfo(torch.float32).min)[:, None]
    if torch.is_autocast_enabled("cpu"):
        mask = mask.to(torch.bfloat16)
    hidden = model.model(ids, attention_mask=mask, position_ids=positions, use_cache=False)[0]
    return hidden, ids, is_query


def log_likelihoods(model: LlamaForCausalLM, hidden: torch.Tensor, ids: torch.Tensor, chosen: torch.Tensor):
    """log p of the chosen tokens [B, S] given what is before them, one number each."""
    states, targets = hidden[:, :-1][chosen[:, 1:]], ids[:, 1:][chosen[:, 1:]]
    filled = torch.nn.functional.pad(states, (0, 0, 0, _filled_up(len(states)) - len(states)))
    logits = model.lm_head(filled)[: len(states)].float()
    return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def _filled_up(count: int) -> int:
    return -(-count // SHAPE_STEP) * SHAPE_STEP
