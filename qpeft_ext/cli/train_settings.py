"""The config of ``qpeft train`` by its options, and the LoRA in the LM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..utils.console import say
from .common import option_value, parse_options, split_options
from .train_options import TrainOptions

if TYPE_CHECKING:
    from ..config import QPeftConfig

LORA = "LoraConfig"  # of peft
_HAVE_MARGIN = ("pairwise", "pointwise_pairwise")  # of the losses


def config_settings(options: TrainOptions) -> dict[str, Any]:
    """Return the options of `QPeftConfig` that are given, directly or by --option, which wins."""
    from ..config import LOSSES

    settings: dict[str, Any] = {
        "clues": options.clues,
        "rank": "auto" if options.rank is None else options.rank,
        "loss": options.loss,
        "margin": options.margin,
        "queries_per_group": options.queries_per_group,
        "num_hard_negatives": options.num_negatives,
        "max_query_tokens": options.max_query_tokens,
        "max_document_tokens": options.max_document_tokens,
        "seed": options.seed,
    }
    settings |= {
        name: value for name in ("template", "layout", "score") if (value := getattr(options, name)) is not None
    }
    given = parse_options(options.option or [])
    loss = (settings | given)["loss"]
    if options.margin and loss in LOSSES and loss not in _HAVE_MARGIN:  # a typo is the config's to name
        raise ValueError(
            f"--margin {options.margin:g} is of --loss {' and '.join(_HAVE_MARGIN)} and does nothing with {loss}; "
            "leave it out"
        )
    settings |= _of_the_clues((settings | given)["clues"], options.k, options.num_heads)
    if options.generated_lora_rank is not None:
        settings["generated_lora_rank"] = options.generated_lora_rank or None
    if "generated_lora_rank" in given:  # --option sets this one field, and target_modules keeps its own default
        settings["target_modules"] = None
    return settings | given


def _of_the_clues(clues: str, k: int | None, num_heads: int | None) -> dict[str, int]:
    """Return the given options of the clues. Raises: ValueError for one that other clues have, and these do not."""
    from ..config import CLUES

    options = {}
    for flag, name, value, kind in (("--k", "k", k, "top_k"), ("--num-heads", "num_heads", num_heads, "attention")):
        if value is not None and clues in CLUES and clues != kind:  # a typo is the config's to name
            raise ValueError(
                f"{flag} {value} is of --clues {kind} and does nothing with {clues}; leave it out, or "
                f"train with --clues {kind}"
            )
        if value is not None:
            options[name] = value
    return options


def config_of(settings: dict[str, Any], has_lora: bool, examples: list | None = None) -> QPeftConfig:
    """Return the recommended config with these settings.

    Args:
        settings: options of `QPeftConfig`.
        has_lora: whether a LoRA in the LM is trained.
        examples: the training examples, if they are known already.
    Raises: ValueError if there is nothing to train.
    """
    from ..config import QPeftConfig
    from ..config.values import DISTILLATION
    from ..training.examples import lacking_negatives

    config = QPeftConfig.recommended(examples, **settings)
    trained = config.num_virtual_tokens, config.generated_lora_rank, config.score == "both" or None, has_lora or None
    if config.clues == "none" and not any(trained):
        raise ValueError(
            "--clues none is UPR, which has nothing to train: use qpeft rerank --upr, or add --lora-rank 8, "
            "--generated-lora-rank 16 or a soft prompt, --option num_virtual_tokens=20"
        )
    if examples is not None:
        if not (config.in_batch_negatives or "in_batch_negatives" in settings or config.loss in DISTILLATION):
            say("no in-batch negatives: every query has enough of its own")
        lacking_negatives(examples, config)
    return config


def lora_options(options: TrainOptions) -> dict[str, Any]:
    """Return the options of the LoRA in the LM. Raises: ValueError for an unknown one; ImportError without peft."""
    from ..lm.new_adapter import expect_adapter_options

    given = {
        name: list(value) if isinstance(value := option_value(text, "," in text), tuple) else value
        for name, text in split_options(options.lora_option or (), "--lora-option")
    }
    expect_adapter_options(LORA, given)
    return {"r": options.lora_rank, "lora_alpha": 2 * options.lora_rank} | given


def batch_size(asked: int | None, group: int) -> int:
    """Return the queries of a batch. Raises: ValueError if they are not a whole number of groups."""
    if asked is not None and (asked < 1 or asked % group):
        raise ValueError(
            f"--batch-size must be a multiple of --queries-per-group, {group}, got {asked}: queries that "
            f"share their documents are read together; --gradient-accumulation adds up batches"
        )
    return group if asked is None else asked
