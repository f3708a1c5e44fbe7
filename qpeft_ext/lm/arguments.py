"""Checks of what is given as a model, an LM, a config or a tokenizer; their errors name the right call."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from ..config import QPeftConfig
from ..utils.inputs import kind_of
from .packed import expect_plain

logger = logging.getLogger(__name__)

_LOAD = "load_lm(name) loads one"


def expect_model(model: object) -> None:
    """Check the model of a `Reranker`.

    Raises: TypeError if it is no `QPeftModel`.
    """
    if hasattr(model, "qpeft_config") and hasattr(model, "prompt"):
        return
    if isinstance(model, str) or hasattr(model, "__fspath__"):
        raise TypeError(
            f"Reranker: model must be a QPeftModel, got {kind_of(model)}; Reranker.from_pretrained(…) "
            "loads an adapter, load_lm and get_qpeft_model make a model of an LM"
        )
    if reason := _why_no_lm(model):
        raise TypeError(f"Reranker: model must be a QPeftModel, got {reason}")
    raise TypeError(
        f"Reranker: model must be a QPeftModel, got the LM {type(model).__name__}; wrap it: "
        "Reranker(get_qpeft_model(lm, QPeftConfig(clues='none')))"
    )


def expect_lm_arguments(what: str, lm: object, config: object, tokenizer: object = None) -> None:
    """Check the arguments that make a model.

    Args:
        what: the function that was called, for messages.
        lm, config, tokenizer: its arguments.
    Raises: TypeError for what is no LM, no config or no tokenizer.
    """
    if reason := _why_no_lm(lm):
        raise TypeError(f"{what}: lm must be a causal or an encoder–decoder LM, got {reason}")
    if not isinstance(config, QPeftConfig):
        got = "a tokenizer, which comes after it" if _is_tokenizer(config) else kind_of(config)
        raise TypeError(f"{what}: config must be a QPeftConfig, got {got}; give QPeftConfig(clues='top_k', …)")
    if tokenizer is not None and not _is_tokenizer(tokenizer):
        raise TypeError(
            f"{what}: tokenizer must be a transformers tokenizer, got {kind_of(tokenizer)}; load it: "
            "AutoTokenizer.from_pretrained(name)"
        )


def without_compilation(lm: Any) -> Any:
    """Return the LM itself, whose modules the passes run, instead of the wrapper that `torch.compile` makes.

    Raises: ValueError for an LM on the meta device.
    """
    inner: Any = lm
    if hasattr(inner, "_orig_mod"):
        logger.warning("the LM comes from torch.compile; passes run it uncompiled, unless Reranker has compile=True")
        inner = inner._orig_mod
    if getattr(getattr(inner.get_input_embeddings(), "weight", None), "is_meta", False):
        raise ValueError(
            "QPeftModel: the LM's weights are on the meta device, without values; load the LM outside of "
            "torch.device('meta')"
        )
    return inner


def freeze(lm: nn.Module, train_lm: bool) -> None:
    """Put the LM into eval mode and freeze its parameters; those of a `peft` model stay as they are.

    Args:
        train_lm: whether all parameters of the LM are trained instead.
    Raises: ValueError for a `peft` adapter that would not be read, and for one or packed weights with ``train_lm``.
    """
    lm.eval()
    if train_lm and hasattr(lm, "peft_config"):
        raise ValueError("QPeftModel: train_lm=True trains the whole LM; give it without its peft adapter")
    if train_lm:
        for name, parameter in lm.named_parameters():
            expect_plain(parameter, f"QPeftModel: train_lm=True trains every weight, but {name}")
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in getattr(lm, "peft_config", {}).values()):
        raise ValueError(
            "QPeftModel: a peft adapter of virtual tokens (prompt tuning, prefix tuning) would not be "
            "read; give the LM without it"
        )
    if not hasattr(lm, "peft_config"):
        lm.requires_grad_(train_lm)


def _why_no_lm(lm: object) -> str:
    """Words for something that is no LM, and what to do; "" for an LM (whether it has a head is tried later)."""
    if isinstance(lm, str) or hasattr(lm, "__fspath__"):
        return f"{kind_of(lm)}; {_LOAD}"
    if _is_tokenizer(lm):
        return f"a tokenizer ({type(lm).__name__}), which comes after the config; {_LOAD}"
    if isinstance(lm, QPeftConfig):
        return "a QPeftConfig, which comes after the LM"
    if hasattr(lm, "qpeft_config"):
        return f"a {type(lm).__name__}, which holds an LM already; take its own: model.lm"
    if hasattr(lm, "model") and hasattr(lm, "tokenizer") and not isinstance(lm, nn.Module):
        return f"a pipeline ({type(lm).__name__}); give its model: pipeline.model"
    if type(lm).__module__.startswith("sentence_transformers"):
        return f"a {type(lm).__name__} of sentence-transformers, which is an encoder; {_LOAD}"
    if isinstance(lm, type):
        return f"the class {lm.__name__}; load a model with it: {lm.__name__}.from_pretrained(name)"
    if not isinstance(lm, nn.Module) or not hasattr(lm, "get_input_embeddings"):
        return f"{kind_of(lm) if not isinstance(lm, nn.Module) else f'the module {type(lm).__name__}'}; {_LOAD}"
    for kind in ("TokenClassification", "QuestionAnswering", "MultipleChoice"):
        if f"For{kind}" in type(lm).__name__:
            return (
                f"a {type(lm).__name__}, which does not write text; load the LM itself: load_lm(name), or "
                "AutoModelForCausalLM.from_pretrained(name)"
            )
    return ""


def _is_tokenizer(value: object) -> bool:
    return hasattr(value, "convert_ids_to_tokens") and not isinstance(value, nn.Module)
