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
    import torch

    from ..adapters.files import describe_lm
    from ..lm.loading import load_lm, load_tokenizer
    from .prefix_tuning import PrefixTuningModel

    classes = {kind.__name__: kind for kind in (QPeftModel, PrefixTuningModel)}
    lm, preset = load_lm(plan.lm_name, dtype=plan.dtype, device=device), method.preset
    if preset.peft:
        import peft

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = getattr(peft, preset.peft)(task_type="CAUSAL_LM", **peft_options(preset, method.peft))
            lm = peft.get_peft_model(lm, config)
    options = dataclasses.replace(plan.config(method, seed), base_model_name_or_path=plan.lm_name)
    model = classes[preset.model](lm, options, load_tokenizer(plan.lm_name))
    model.qpeft_config = dataclasses.replace(model.qpeft_config, base_model=describe_lm(model.engine))
    return model
