"""Find the decoder of an LM: the module whose hidden states the head reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .passes import hooked


@torch.no_grad()
def find_decoder(lm: Any, run: Callable[[], object]) -> nn.Module:
    """Return the decoder: ``lm.get_decoder()`` if that module runs, which transformers guesses by names.

    Otherwise it is the outermost module whose ``last_hidden_state`` the head reads, or else the last one that ends
    (ModernBERT has one more layer before the head).

    Args:
        lm: the language model.
        run: one forward of it.
    Raises: ValueError if there is none.
    """
    ended: dict[nn.Module, Tensor] = {}
    read: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple, output: object) -> None:
        hidden = getattr(output, "last_hidden_state", None)
        if isinstance(hidden, Tensor) and hidden.dim() == 3:
            ended.pop(module, None)  # the order is that of the last call
            ended[module] = hidden

    inner = [(module, note) for module in lm.modules() if module is not lm]
    head = lm.get_output_embeddings()
    heads = [] if head is None else [(head, lambda _, inputs: read.extend(inputs[:1]))]
    with hooked(heads, inner):
        run()
    named = lm.get_decoder() if hasattr(lm, "get_decoder") else None
    if named in ended:
        return named
    outermost_first = list(reversed(ended))
    for module in outermost_first:
        if read and read[-1].shape == ended[module].shape and torch.equal(read[-1], ended[module]):
            return module
    if not outermost_first:
        raise ValueError(
            f"no module of this {lm.config.model_type} LM gives the hidden states that its head reads, so "
            "that prompts with clues cannot be given to it; use another LM"
        )
    return outermost_first[0]
