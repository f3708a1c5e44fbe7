"""The LM head as a formula, checked once against the model's own logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..ops import token_log_likelihood
from .packed import is_packed


class LikelihoodHead:
    """log p of given tokens from final hidden states: z = cap·tanh((scale·h·Wᵀ + bias)/cap), then log-softmax.

    Cap and scale come from the LM's config (``final_logit_softcapping``, ``logit_scale``, ``logits_scaling``); the bias
    is the layer's, plus the LM's own where it has one (BART). Names differ between families, so a probe compares the
    formula with the model's logits.

    Args:
        lm: the language model.
        probe: returns the LM's own logits [L, V] and final hidden states [L, D] for the token ids of two parts of a
            prompt.
        logit_scale: None takes the config's.

    Attributes:
        fused: True when the formula agrees; False when the model's own logits must be used.
        reason: why not, in words ("" when fused).
    """

    def __init__(
        self,
        lm,
        probe: Callable[[Sequence[int], Sequence[int]], tuple[Tensor, Tensor]],
        logit_scale: float | None = None,
    ) -> None:
        self.lm = lm
        self.module = lm.get_output_embeddings()
        config = lm.config.get_text_config()
        scaling = getattr(config, "logits_scaling", None)
        of_config = getattr(config, "logit_scale", None) or (1.0 / scaling if scaling else 1.0)
        self.logit_scale = float(of_config if logit_scale is None else logit_scale)
        self.soft_cap = getattr(config, "final_logit_softcapping", None)
        self.reason = self._why_not_fused(probe)
        self.fused = not self.reason

    @property
    def bias(self) -> Tensor | None:
        """[V], or None. Not kept, since a buffer is another tensor after the LM has moved."""
        of_layer, of_lm = self.module.bias, getattr(self.lm, "final_logits_bias", None)
        if of_lm is None:
            return of_layer
        of_lm = of_lm[0].to(self.module.weight.dtype)
        return of_lm if of_layer is None else of_layer + of_lm

    @property
    def rows(self) -> int | None:
        """How many tokens it scores; None where its module does not say."""
        return getattr(self.module, "out_features", None)

    def _why_not_fused(self, probe) -> str:
        if type(self.module) is not nn.Linear:  # packed, or a LoRA layer whose product is not yet zero
            return f"the LM head is a {type(self.module).__name__}, not a plain Linear layer"
        if is_packed(self.module.weight):
            return f"the LM head's weight is packed ({type(self.module.weight).__name__})"
        ids = [i % len(self.module.weight) for i in range(4)]
        with torch.no_grad():
            own, hidden = probe(ids, ids)
            own, ours = own.float(), self._logits(hidden, self.module.weight, self.bias).float()
        if not own.isfinite().all():
            raise ValueError(
                "the LM's logits are not finite: its weights are broken, or its dtype overflows "
                "(try bfloat16 or float32)"
            )
        # both round once to the model's dtype, in a different order
        tolerance = 1e-4 if own.dtype == hidden.dtype else 4 * torch.finfo(hidden.dtype).eps
        atol = tolerance * float(own.abs().max())
        if own.shape != ours.shape or not torch.allclose(own, ours, rtol=tolerance, atol=atol):
            return "the head formula does not give this model's logits"
        return ""

    def _logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = self.logit_scale * nn.functional.linear(hidden.to(weight.dtype), weight)
        logits = logits if bias is None else logits + bias
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)

    def token_logits(self, outputs: Tensor, token_ids: Tensor) -> Tensor:
        """Compute logits of K tokens for each row; only K rows of the head are read.

        Args:
            outputs: of an engine: hidden states [R, D] where `fused`, else the LM's own logits [R, V].
            token_ids: int64 [K].
        Returns: float32 [R, K].
        """
        if not self.fused:
            return outputs[:, token_ids].float()
        bias = None if self.bias is None else self.bias[token_ids].float()
        return self._logits(outputs, self.module.weight[token_ids].float(), bias)

    def log_likelihood(self, outputs: Tensor, target_ids: Tensor) -> Tensor:
        """Compute log p of a token for each row.

        Args:
            outputs: as for `token_logits`.
            target_ids: int64 [R].
        Returns: nats, float32 [R].
        """
        if not self.fused:
            return outputs.float().log_softmax(-1).gather(-1, target_ids[:, None])[:, 0]
        weight = self.module.weight
        return token_log_likelihood(
            outputs.to(weight.dtype), weight, target_ids, self.bias, self.soft_cap, self.logit_scale
        )
