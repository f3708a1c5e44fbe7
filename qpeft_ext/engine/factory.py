"""Makes the engine for an LM."""

from __future__ import annotations

import torch

from ..lm.adapter_kinds import expect_readable_adapters
from ..lm.errors import LM_ERRORS, in_one_line
from ..lm.loading import is_encoder_decoder
from ..lm.packed import is_coarse
from ..lm.probe_ids import ordinary_ids
from ..utils.memory import raise_if_out_of_memory
from .base import gives_tuples
from .causal import CausalEngine
from .encoder_decoder import EncoderDecoderEngine


def make_engine(lm, why_not_cached: str = "") -> CausalEngine | EncoderDecoderEngine:
    """Make the engine for an LM.

    Args:
        lm: the language model.
        why_not_cached: for `CausalEngine`.
    Raises: ValueError for a model that is neither a causal nor an encoder–decoder LM, for an LM that fails, and for
        an adapter in it that would not be read.
    """
    try:
        return _make_engine(lm, why_not_cached)
    except ValueError:
        raise
    except LM_ERRORS as error:
        raise_if_out_of_memory(error)
        raise ValueError(f"this {lm.config.model_type} LM cannot be used: {in_one_line(error)}") from error


def _make_engine(lm, why_not_cached: str) -> CausalEngine | EncoderDecoderEngine:
    expect_readable_adapters(lm)
    if gives_tuples(lm):
        raise ValueError(
            f"the config of this {lm.config.model_type} LM has return_dict=False, so that its modules return tuples; "
            "set lm.config.return_dict = True"
        )
    if hasattr(lm.config, "lsh_attn_chunk_length"):
        raise ValueError(
            f"a {lm.config.model_type} LM pads token ids to chunks of its own, which embeddings do not go "
            "through; use another LM"
        )
    if reason := _why_not_language_model(lm):
        raise ValueError("expected a causal LM (Llama, Qwen, GPT-2, …) or an encoder–decoder LM (T5, BART, …), got a "
                         f"{lm.config.model_type} model {reason}; load_lm loads one")  # fmt: skip
    return EncoderDecoderEngine(lm) if is_encoder_decoder(lm.config) else CausalEngine(lm, why_not_cached)


@torch.no_grad()
def _why_not_language_model(lm) -> str:
    """Say why a model is no language model; "" if it is one.

    The logits of a causal LM do not depend on later tokens, nor on how many there are.
    """
    *same, last, another = ordinary_ids(lm, 5)  # none is padding, which no token sees
    first, other = (torch.tensor([[*same, i]], device=lm.get_input_embeddings().weight.device) for i in (last, another))
    prompts = [first, other]  # one per pass: a model that mixes the rows of a batch would change both alike
    encoder_decoder, coarse = is_encoder_decoder(lm.config), is_coarse(lm)
    if not encoder_decoder and not coarse:  # fewer tokens are rounded otherwise
        prompts.append(first[:, :-1])
    before = []
    for ids in prompts:
        read = {"input_ids": first, "decoder_input_ids": ids} if encoder_decoder else {"input_ids": ids}
        logits = getattr(lm(**read), "logits", None)
        if logits is None or logits.dim() != 3:
            return "without an LM head"
        before.append(logits[:, : len(same)].float())
    tolerance = 1e-4 if not coarse else 4 * torch.finfo(torch.bfloat16).eps
    if any(float((x - before[0]).abs().max()) > tolerance * float(before[0].abs().max()) for x in before):
        return "whose tokens see those behind them, as in encoder-only models"
    return ""
