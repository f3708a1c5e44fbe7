"""The soft prompt: trained virtual tokens in place of the instruction, the same for every query and document."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import QPeftConfig
from ..prompts.prompt import Prompt
from .filters import allowed_ids
from .layers import Float32Module, ResidualMLP


class SoftPrompt(Float32Module):
    """P virtual tokens at a fixed place of every document prefix (prompt tuning, https://arxiv.org/abs/2104.08691).

    They belong to the prefix as tokens of the text do; padding stands to the left of the whole prefix.

    Args:
        rows: the virtual tokens at the start, in the space of table rows, [P, D].
        scale: what the LM's embedding module multiplies a row with.
        start: how many tokens of the prefix stand before them.
        mlp: inner width of an MLP that the trained rows pass through (with a residual path, the identity at the
            start); None: no MLP. It is saved with the adapter, so that training can be resumed.
    """

    def __init__(self, rows: Tensor, scale: float, start: int, mlp: int | None = None) -> None:
        super().__init__()
        self.scale, self.start = scale, start
        self.rows = nn.Parameter(rows.detach().float().clone())
        self.mlp = None if mlp is None else ResidualMLP(rows.shape[1], mlp)

    def forward(self) -> Tensor:
        """The virtual tokens in the space of ``inputs_embeds``, [P, D] float32."""
        return (self.rows if self.mlp is None else self.mlp(self.rows)) * self.scale

    def put_into(self, embeds: Tensor, starts: Tensor) -> Tensor:
        """``embeds`` [B, L, D] with the virtual tokens in their slots; the prefix of row i begins at ``starts[i]``."""
        vectors = self().expand(len(embeds), -1, -1).to(embeds.dtype)  # expanded first: gradients are summed in float32
        slots = starts[:, None] + torch.arange(self.start, self.start + vectors.shape[1], device=starts.device)
        return embeds.index_put((torch.arange(len(embeds), device=starts.device)[:, None], slots), vectors)


def build_soft_prompt(
    config: QPeftConfig, prompt: Prompt, table: Tensor, scale: float, context: int | None
) -> SoftPrompt | None:
    """The soft prompt of a config for an LM; None without ``num_virtual_tokens``.

    Args:
        config: a `QPeftConfig`.
        prompt: the model's.
        table: the LM's input embeddings, [V, D].
        scale: what its embedding module multiplies a row with.
        context: the longest prompt that the LM reads, in tokens; None: unlimited.
    Raises: ValueError if the LM's context cannot hold it, or there is no text to take its rows from.
    """
    P = config.num_virtual_tokens
    if P is None:
        return None
    rest = prompt.least_tokens - P
    if context and P + rest > context:
        raise ValueError(
            f"QPeftConfig: num_virtual_tokens must be at most {context - rest}, got {P}: the LM's "
            f"context is {context}, and the rest of a prompt takes {rest} or more"
        )
    if config.soft_prompt_init == "text":
        words: list[int] = list(prompt.instruction_ids)
        if not words:
            raise ValueError(
                "QPeftConfig: soft_prompt_init='text' needs an instruction; set one, or soft_prompt_init='random'"
            )
        ids = torch.tensor((words * -(-P // len(words)))[:P])
    else:
        known = allowed_ids(prompt.tokenizer, len(table))[: len(prompt.tokenizer)].nonzero()[:, 0]
        ids = known[torch.randint(len(known), (P,))]
    return SoftPrompt(table[ids.to(table.device)], scale, prompt.soft_prompt_start, config.soft_prompt_mlp)
