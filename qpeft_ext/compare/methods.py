"""The methods that can be compared, and the options that each sets.

Nearly all are options of `QPeftConfig` over the LM or over a `peft` model of it. They are trained by `QPeftTrainer` and
rank through `Reranker`, as any adapter does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..lm.new_adapter import expect_adapter_options

FIRST_STAGE, UPR = "first_stage", "upr"


@dataclass(frozen=True)
class Preset:
    """A method with its defaults.

    Attributes:
        about: one line for the report.
        trained: whether it has a module to train.
        lm: whether the LM runs when it ranks.
        options: options of `QPeftConfig`.
        peft: name of the peft config class of its adapter in the LM; None: it has no such adapter.
        peft_defaults: options of that class.
        model: name of the class of its model; see `models.build_model`.
    """

    about: str
    trained: bool = True
    lm: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    peft: str | None = None
    peft_defaults: dict[str, Any] = field(default_factory=dict)
    model: str = "QPeftModel"


_PLAIN = {"clues": "none"}
_LORA = {"r": 8, "lora_alpha": 16}

PRESETS: dict[str, Preset] = {
    FIRST_STAGE: Preset("the candidates as they come", False, lm=False, options=_PLAIN),
    "similarity": Preset("sum of the k largest cosines between query and document tokens in the LM's embedding table; "
                         "no LM runs", False, lm=False, options=_PLAIN),
    UPR: Preset("log-likelihood of the query, frozen LM, no clues", False, options=_PLAIN),
    "hard_clues": Preset("the k most similar document tokens repeated as text: the clue module of Q-PEFT-R before "
                         "training is the identity, so that its clues are the tokens' own embeddings", False,
                         options={"clues": "top_k"}),
    "soft_prompt": Preset("prompt tuning: trained virtual tokens in place of the instruction, pads leftmost",
                          options={"clues": "none", "num_virtual_tokens": 20}),
    "prefix_tuning": Preset("trained keys and values in every layer (peft), likelihood objective", options=_PLAIN,
                            peft="PrefixTuningConfig", peft_defaults={"num_virtual_tokens": 20, "init_weights": "zero"},
                            model="PrefixTuningModel"),
    "lora": Preset("LoRA (peft), likelihood objective", options=_PLAIN, peft="LoraConfig", peft_defaults=_LORA),
    "dora": Preset("DoRA (peft), likelihood objective", options=_PLAIN, peft="LoraConfig",
                   peft_defaults=_LORA | {"use_dora": True}),
    "ia3": Preset("IA³ (peft), likelihood objective", options=_PLAIN, peft="IA3Config"),
    "yes_no": Preset("log-odds of yes and no after document and query, LoRA (peft), softmax over the documents of a "
                     "query", options=_PLAIN | {"score": "yes_no", "loss": "listwise", "temperature": 1.0},
                     peft="LoraConfig", peft_defaults=_LORA),
    "full": Preset("full fine-tuning, likelihood objective", options={"clues": "none", "train_lm": True}),
    "q_peft_r": Preset("Q-PEFT-R: the k most similar document tokens, re-embedded", options={"clues": "top_k"}),
    "q_peft_a": Preset("Q-PEFT-A: the query attends over the document tokens", options={"clues": "attention"}),
    "q_peft_r_lora": Preset("Q-PEFT-R over a LoRA, trained together", options={"clues": "top_k"}, peft="LoraConfig",
                            peft_defaults=_LORA),
    "q_peft_a_lora": Preset("Q-PEFT-A over a LoRA, trained together", options={"clues": "attention"},
                            peft="LoraConfig", peft_defaults=_LORA),
    "generated_lora": Preset("low-rank updates of the LM's layers that the query generates, no clues",
                             options={"clues": "none", "generated_lora_rank": 16, "target_modules": "all-linear"}),
    "fusion": Preset("min-max scores of a method and of the first stage, weights chosen on dev", False, options=_PLAIN),
}  # fmt: skip


def peft_options(preset: Preset, given: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the preset's peft config, with those that are given; empty if it has none.

    Raises: ValueError for an unknown option; ImportError without peft.
    """
    if preset.peft is None:
        return {}
    expect_adapter_options(preset.peft, given)
    return preset.peft_defaults | given
