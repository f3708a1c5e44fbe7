"""Checks of what is given as a model, an LM, a config or a tokenizer; their errors name the right call."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
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


def expect_lm(what: str, lm: object) -> None:
    """Check that an object is an LM.

    Args:
        what: the function that was called, for messages.
        lm: its argument.
    Raises: TypeError for what is none.
    """
    if reason := _why_no_lm(lm):
        raise TypeError(f"{what}: lm must be a causal or an encoder–decoder LM, got {reason}")


def expect_lm_arguments(what: str, lm: object, config: object, tokenizer: object = None) -> None:
    """Check the arguments that make a model.

    Args:
        what: the function that was called, for messages.
        lm, config, tokenizer: its arguments.
    Raises: TypeError for what is no LM, no config or no tokenizer.
    """
    expect_lm(what, lm)
    if not isinstance(config, QPeftConfig):
        got = "a tokenizer, which comes after it" if _is_tokenizer(config) else kind_of(config)
        raise TypeError(f"{what}: config must be a QPeftConfig, got {got}; give QPeftConfig(clues='top_k', …)")
    if tokenizer is not None and not _is_tokenizer(tokenizer):
        raise TypeError(
            f"{what}: tokenizer must be a transformers tokenizer, got {kind_of(tokenizer)}; load it: "
            "AutoTokenizer.from_pretrained(name)"
        )


def loading_keywords(what: str, lm_kwargs: Mapping[str, Any] | None, **named: Any) -> dict[str, Any]:
    """Join all that a call says about how its LM is loaded.

    Args:
        what: the function that was called, for messages.
        lm_kwargs: its argument for further keywords of `load_lm`.
        named: keywords of `load_lm` that are arguments of their own; None where they are not given.
    Returns: keywords of `load_lm`.
    Raises: ValueError for one that is given twice, with two values.
    """
    given = dict(lm_kwargs or {})
    for name, value in named.items():
        if value is not None and given.get(name) not in (None, value):
            raise ValueError(f"{what}: {name} is {value!r}, and {given[name]!r} in lm_kwargs; give it once")
        given[name] = given.get(name) if value is None else value
    return given


def expect_not_loaded(what: str, lm: object, keywords: Mapping[str, Any]) -> None:
    """Check that nothing is said about how to load an LM that is loaded already, which would be ignored.

    Args:
        what: the function that was called, for messages.
        lm: its LM: loaded, a name, or None.
        keywords: for `load_lm`; those that say where its files are may be for the tokenizer.
    Raises: ValueError that names a keyword.
    """
    for name in ("dtype", "device", "attention", "quantization_config", "device_map"):
        if isinstance(lm, nn.Module) and keywords.get(name) is not None:
            raise ValueError(
                f"{what}: {name}={keywords[name]!r} is for an LM that is loaded by its name, and this one is loaded; "
                f"leave {name} out, or load the LM so"
            )


def is_name(lm: object) -> bool:
    """Tell whether an LM is given by its name."""
    return isinstance(lm, (str, os.PathLike))


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
