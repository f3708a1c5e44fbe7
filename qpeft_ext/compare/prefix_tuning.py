"""Prefix tuning from `peft` on the document-first engine: trained keys and values in front of every document prefix."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..config import QPeftConfig
from ..engine.causal import CausalEngine, _PrefixCache, _PrefixIsStored
from ..lm.passes import without_cudnn_attention
from ..model import QPeftModel
from ..prefixes.kv import LayerKV, PrefixKV
from ..prompts.pairs import pad
from ..prompts.prompt import Document, DocumentPrefix, Prompt


class PrefixTuningModel(QPeftModel):
    """Likelihood reranking with a `peft` model of `PrefixTuningConfig`; only its prefix encoder is trained.

    The P virtual keys and values stand before each document's prefix, as in peft's own forward pass: text begins at
    position P. Their padding is not peft's: pads are leftmost, so that a score does not depend on the batch.

    Args:
        lm: a `PeftModel` with prefix tuning.  config: ``clues="none"``.
    Raises: ValueError for an LM whose cache cannot be shared, or has sliding windows (padding would count in them).
    """

    def __init__(self, lm, config: QPeftConfig, tokenizer) -> None:
        super().__init__(lm.get_base_model(), config, tokenizer)
        self.lm = lm
        self.engine = PrefixTuningEngine(lm)
        self.prompt = _PromptAfterPrefix(tokenizer, self.qpeft_config, self.engine.num_virtual_tokens)

    def forward(self, batch, path: str = "document_first", *args, **options):
        """As `QPeftModel.forward`; there is no plain path."""
        if path != "document_first":
            raise ValueError(f"prefix tuning has the path document_first only, got {path!r}")
        return super().forward(batch, path, *args, **options)


class _PromptAfterPrefix(Prompt):
    """Keeps a slot for each virtual token at the start of every document prefix, so that all lengths count them."""

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
    """Prefix passes that begin with the virtual keys and values of a `peft` model.

    Attributes: num_virtual_tokens: P.
    """

    num_virtual_tokens = 0  # while the LM is tried

    def __init__(self, lm) -> None:
        super().__init__(lm.get_base_model())
        if self.why_plain:
            raise ValueError(f"prefix tuning needs document prefixes that can be shared: {self.why_plain}")
        if not self.head.fused:
            raise ValueError(f"prefix tuning needs a plain LM head: {self.head.reason}")
        self.lm = lm  # its parameters, the prefix encoder's among them, tell versions of cached prefixes apart
        self.num_virtual_tokens = lm.active_peft_config.num_virtual_tokens

    def _why_plain(self) -> str:
        why = super()._why_plain()
        if not why and any(layer and layer[-1] for layer in self.layout.layers):
            raise ValueError(
                "prefix tuning: an LM with sliding windows is not supported, since padding between the "
                "virtual tokens and the document would count in its windows"
            )
        return why

    @without_cudnn_attention()
    def read_prefixes(self, prefixes: Sequence[Sequence[int]]) -> PrefixKV:
        """As `CausalEngine.read_prefixes`; the first P ids of a prefix are slots for the virtual tokens."""
        P, N = self.num_virtual_tokens, len(prefixes)
        lengths = [len(ids) for ids in prefixes]
        width = max(lengths) - P
        self.expect_fits(P + width)
        ids, _ = pad([[0] * (width + P - len(row)) + list(row[P:]) for row in prefixes], self.device)
        gaps = width + P - torch.tensor(lengths, device=self.device)
        slots = torch.arange(width, device=self.device)
        mask = (slots >= gaps[:, None]).long()
        positions = P + (slots - gaps[:, None]).clamp_min(0)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.prefix_is_trained):
            cache = _PrefixCache(-1, config=self.lm.config)
            for layer, (keys, values) in enumerate(self._virtual_tokens()):
                cache.update(keys.expand(N, -1, -1, -1), values.expand(N, -1, -1, -1), layer)
            cache.last_layer = self.last_layer
            extra = {self.cache_argument: cache} | ({"position_ids": positions} if self.takes_positions else {})
            with contextlib.suppress(_PrefixIsStored):
                self.decoder(
                    input_ids=ids, attention_mask=torch.cat([mask.new_ones(N, P), mask], dim=1), use_cache=True, **extra
                )
            return _pads_first(PrefixKV.from_cache(cache, lengths), gaps, P)

    def _virtual_tokens(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, [1, heads, P, head width]."""
        if not self.num_virtual_tokens:
            return []
        prompt = self.lm.get_prompt(1)
        if hasattr(prompt, "layers"):
            return [(layer.keys, layer.values) for layer in prompt.layers]
        return [(layer[0], layer[1]) for layer in prompt]


def _pads_first(prefix: PrefixKV, gaps: Tensor, P: int) -> PrefixKV:
    """Slots [virtual, pads, document] in the order [pads, virtual, document]; keys carry their positions with them."""
    slots = torch.arange(prefix.padded_length, device=gaps.device)
    gaps = gaps[:, None]
    source = torch.where(slots < gaps, slots + P, torch.where(slots < gaps + P, slots - gaps, slots))  # [N, slots]

    def moved(tensor: Tensor) -> Tensor:
        index = source[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
        return tensor.gather(2, index)

    layers = [kv and LayerKV(moved(kv.keys), moved(kv.values), kv.window) for kv in prefix.layers]
    return PrefixKV(layers, prefix.lengths)
