"""Views of one document prefix, in each of which some of its tokens are hidden."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .kv import PrefixBatch, PrefixKV, SeparatePrefixes


@dataclass
class PrefixViews(PrefixKV):
    """Keys and values of one prefix for several pairs, each of which attends to other slots of it.

    Attributes (and those of `PrefixKV`):
        visible: which slots each pair attends to, bool [B, P].
    """

    visible: Tensor | None = None

    @classmethod
    def of(cls, prefix: PrefixBatch, visible: Tensor, dtype: torch.dtype) -> PrefixViews:
        """Make the views.

        Args:
            prefix: of one document, as it is stored.
            visible: bool [B, P].
            dtype: in which the LM reads keys and values.
        """
        if isinstance(prefix, SeparatePrefixes):
            prefix = PrefixKV.collate(prefix.prefixes, dtype)
        assert isinstance(prefix, PrefixKV)  # as every other prefix of a causal LM
        return cls(prefix.layers, prefix.lengths, visible=visible)

    def mask(self, device: torch.device, rows: Tensor | None = None) -> Tensor:
        assert self.visible is not None  # as `of` makes it
        return self.visible.to(device).long()
