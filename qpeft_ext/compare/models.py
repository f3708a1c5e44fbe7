"""Models of the methods that are compared."""

from __future__ import annotations

import dataclasses

from ..model import QPeftModel
from .methods import peft_options
from .plan import Method, Plan


def build_model(plan: Plan, method: Method, seed: int, device: str) -> QPeftModel:
    """Build the model of a method before it is trained, on a freshly loaded LM.

    A method of `peft` gets its adapter in the LM. The same seed gives the same initial weights.

    Raises: ValueError where peft does not know the LM's layers.
    """
    from ..adapters.own_lm import describe_lm
    from ..lm.loading import load_lm, load_tokenizer
    from ..lm.new_adapter import with_new_adapter
    from .prefix_tuning import PrefixTuningModel

    classes = {kind.__name__: kind for kind in (QPeftModel, PrefixTuningModel)}
    lm, preset = load_lm(plan.lm_name, dtype=plan.dtype, device=device), method.preset
    if preset.peft:
        lm = with_new_adapter(lm, preset.peft, peft_options(preset, method.peft), seed)
    options = dataclasses.replace(plan.config(method, seed), base_model_name_or_path=plan.lm_name)
    model = classes[preset.model](lm, options, load_tokenizer(plan.lm_name))
    model.qpeft_config = dataclasses.replace(model.qpeft_config, base_model=describe_lm(model.engine))
    return model
