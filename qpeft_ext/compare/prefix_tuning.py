"""Prefix tuning of `peft` on the document-first engine: trained keys and values before every document prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..config import QPeftConfig
from ..engine.causal import CausalEngine
from ..model import QPeftModel
from ..prefixes.kv import LayerKV, PrefixKV
from ..prompts.pieces import DocumentPrefix
from ..prompts.prompt import Document, Prompt


class PrefixTuningModel(QPeftModel):
    """Likelihood reranking with a `peft` model of `PrefixTuningConfig`; only its prefix encoder is trained.

    The P virtual keys and values stand before each document's prefix, and the text begins at position P, as in peft's
    own forward pass. Padding is left of both, unlike peft's, so that a score does not depend on the batch.

    Args:
        lm: a `PeftModel` with prefix tuning.
        config: one with ``clues="none"``.
        tokenizer: the LM's.
    Raises: ValueError for an LM whose cache cannot be shared, or has sliding windows (padding would count in them).
    """

    def __init__(self, lm, config: QPeftConfig, tokenizer) -> None:
        super().__init__(lm.get_base_model(), config, tokenizer)
        self.lm = lm
        self.engine = PrefixTuningEngine(lm)
        self.prompt = _PromptAfterPrefix(tokenizer, self.qpeft_config, self.engine.num_virtual_tokens)

    def forward(self, batch, path: str = "document_first", *args, **options):
        """Score pairs as `QPeftModel.forward` does; there is no plain path."""
        if path != "document_first":
            raise ValueError(f"prefix tuning has the path document_first only, got {path!r}")
        return super().forward(batch, path, *args, **options)


class _PromptAfterPrefix(Prompt):
    """A prompt with a slot for each virtual token at the start of every document prefix, so that lengths count them."""

    def __init__(self, tokenizer, config: QPeftConfig, num_virtual_tokens: int) -> None:
        super().__init__(tokenizer, config)
        self.num_virtual_tokens = num_virtual_tokens

    def documents(self, documents: Sequence[Document]) -> list[DocumentPrefix]:
        P = self.num_virtual_tokens
        return [
            replace(prefix, ids=(*(0,) * P, *prefix.ids), start=prefix.start + P, end=prefix.end + P)
            for prefix in super().documents(documents)
        ]


class PrefixTuningEngine(CausalEngine):
    """A causal engine whose prefix passes begin with the virtual keys and values of a `peft` model.

    Args:
        lm: a `PeftModel` with prefix tuning.
    Attributes:
        num_virtual_tokens: P.
    """

    num_virtual_tokens = 0  # while `CausalEngine` tries the LM

    def __init__(self, lm) -> None:
        super().__init__(lm.get_base_model())
        if self.why_not_cached:
            raise ValueError(f"prefix tuning needs document prefixes that can be shared: {self.why_not_cached}")
        if not self.head.fused:
            raise ValueError(f"prefix tuning needs a plain LM head: {self.head.reason}")
        self.lm = lm  # its parameters, the prefix encoder's among them, tell versions of cached prefixes apart
        self.num_virtual_tokens = lm.active_peft_config.num_virtual_tokens

    def _why_not_cached(self) -> str:
        why = super()._why_not_cached()
        if not why and any(layer and layer[-1] for layer in self.packing.layers):
            raise ValueError(
                "prefix tuning: an LM with sliding windows is not supported, since padding between the "
                "virtual tokens and the document would count in its windows"
            )
        return why

    def read_prefixes(self, prefixes: Sequence[Sequence[int]], leading: PrefixKV | None = None) -> PrefixKV:
        """The pass of `CausalEngine.read_prefixes`, after the virtual tokens, whose slots are the first P ids."""
        P = self.num_virtual_tokens
        if not P:
            return super().read_prefixes(prefixes, leading)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.prefix_is_trained):
            leading = self._virtual_tokens()
        return super().read_prefixes([ids[P:] for ids in prefixes], leading)

    def _virtual_tokens(self) -> PrefixKV:
        """Keys and values of the virtual tokens, for one row."""
        prompt = self.lm.get_prompt(1)
        if hasattr(prompt, "layers"):
            layers = [(layer.keys, layer.values) for layer in prompt.layers]
        else:
            layers = [(layer[0], layer[1]) for layer in prompt]
        return PrefixKV([LayerKV(keys, values, None) for keys, values in layers], [self.num_virtual_tokens])
