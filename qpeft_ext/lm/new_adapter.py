"""New adapters of `peft` in the LM (LoRA, DoRA, …), to be trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..utils.words import did_you_mean


def expect_adapter_options(kind: str, given: Mapping[str, Any]) -> None:
    """Check the names of options of an adapter.

    Args:
        kind: name of a config class of `peft`.
        given: the options.
    Raises: ValueError for an unknown one; ImportError without peft.
    """
    try:
        import peft
    except ImportError:
        raise ImportError(f"{kind} needs the package peft: pip install 'qpeft_ext[train]'") from None
    known = [f.name for f in dataclasses.fields(getattr(peft, kind))]
    for name in given:
        if name not in known:
            raise ValueError(f"{kind}: unknown option {name!r}{did_you_mean(name, known)}")


def with_new_adapter(lm: Any, kind: str, options: Mapping[str, Any], seed: int) -> Any:
    """Put an adapter into an LM.

    Args:
        lm: a causal or an encoder–decoder LM of transformers.
        kind: name of a config class of `peft`.
        options: of that class.
        seed: the same one gives the same initial weights.
    Returns: a `peft.PeftModel`.
    Raises: ValueError, one line, for options that do not fit, or where peft does not know the LM's layers.
    """
    import peft
    import torch

    from .loading import is_encoder_decoder, one_line

    task = "SEQ_2_SEQ_LM" if is_encoder_decoder(lm.config) else "CAUSAL_LM"
    with one_line(f"cannot put an adapter ({kind}) into the LM"), torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(lm, getattr(peft, kind)(task_type=task, **options))
