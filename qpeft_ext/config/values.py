"""Values that an option may have, and checks of one value at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..utils.text import shorten
from ..utils.text_templates import looks_like_text
from ..utils.words import did_you_mean
from .rerankers import RERANKERS

CLUES = ("attention", "top_k", "none")
FILTERS = ("query_tokens", "stop_words", "non_alphabetic")
SIMILARITIES = ("cosine", "dot")
SELECTIONS = ("similarity", "random")
SOURCES = ("document", "candidates", "vocabulary", "vocabulary_per_token")
CLUE_EMBEDDINGS = ("frozen", "low_rank", "full")
SOFT_PROMPT_INITS = ("text", "random")
LOSSES = (
    "pointwise_pairwise",
    "pointwise",
    "pairwise",
    "listwise",
    "contrastive",
    "binary_cross_entropy",
    "ranknet",
    "lambda_loss",
    "margin_mse",
    "kl_divergence",
)
DISTILLATION = ("margin_mse", "kl_divergence")  # losses that read teacher scores
LAYOUTS = ("document_first", "clues_first", "query_first")
COMPAT = ("none", "official")
WRITTEN_TEMPLATES = ("qpeft", "upr", "chat")  # ours, which have places for clues
TEMPLATES = (*WRITTEN_TEMPLATES, *RERANKERS)
SPECIAL_TOKENS = ("auto", "tokenizer", "bos")
SCORES = ("likelihood", "yes_no", "graded", "both")
ANSWER = ("score", "yes_words", "no_words", "exact_words", "max_grade")  # options that say what an LM answers
DEFAULT_INSTRUCTION = "Please write a question for the passage."
OFFICIAL_INSTRUCTION = "given the hints, please generate a question for the input passage"
OFFICIAL = {  # options in which compat="official" has no choice: one that is left at its default takes this value
    "rank": None,
    "residual": False,
    "clue_embeddings": "full",
    "attention_bias": True,
    "source": "document",
    "selection": "similarity",
    "score_gate": False,
    "generated_lora_rank": None,
    "num_virtual_tokens": None,
    "template": "qpeft",
    "special_tokens": "bos",
    "allow_special_tokens": True,
    "score": "likelihood",
}
_CHOICES = {
    "clues": CLUES,
    "source": SOURCES,
    "clue_embeddings": CLUE_EMBEDDINGS,
    "similarity": SIMILARITIES,
    "selection": SELECTIONS,
    "loss": LOSSES,
    "soft_prompt_init": SOFT_PROMPT_INITS,
    "layout": LAYOUTS,
    "compat": COMPAT,
    "special_tokens": SPECIAL_TOKENS,
    "score": SCORES,
}
_BOOLEANS = (
    "score_gate",
    "attention_bias",
    "residual",
    "train_lm",
    "allow_special_tokens",
    "in_batch_negatives",
    "exact_words",
)
_LEAST = {
    "k": 1,
    "num_heads": 1,
    "max_document_tokens": 1,
    "max_query_tokens": 1,
    "queries_per_group": 1,
    "num_hard_negatives": 0,
    "num_random_negatives": 0,
    "max_grade": 1,
}
_COUNTS_OR_NONE = ("suffix_micro_batch", "generated_lora_rank", "num_virtual_tokens", "soft_prompt_mlp")
_MAX_TEXT = 1 << 16


def check_values(options: Mapping[str, Any]) -> None:
    """Check every option by itself. Raises: TypeError or ValueError that names the option and what it may be."""
    for name, allowed in _CHOICES.items():
        _one_of(name, options[name], allowed)
    _text("template", options["template"])
    if not looks_like_text(options["template"]):
        _one_of("template", options["template"], TEMPLATES, " or a file of Jinja2")
    for name in options["filters"]:
        _one_of("filters", name, FILTERS)
    for name in _BOOLEANS:
        if not isinstance(options[name], bool):
            raise TypeError(f"QPeftConfig: {name} must be True or False, got {shorten(options[name])}")
    for name, least in _LEAST.items():
        at_least(name, options[name], least)
    at_least("seed", options["seed"], 0, 2**63 - 1)
    for name in _COUNTS_OR_NONE:
        if options[name] is not None:
            at_least(name, options[name], 1)
    if options["rank"] is not None and options["rank"] != "auto":
        at_least("rank", options["rank"], 1)
    for name in ("instruction", "base_model_name_or_path", "peft_type", "ask"):
        if name not in ("base_model_name_or_path", "ask") or options[name] is not None:
            _text(name, options[name])
    for name, needed in (("yes_words", ", at least one"), ("no_words", "")):
        words = options[name]
        if not all(isinstance(word, str) and word.strip() for word in words) or (needed and not words):
            raise ValueError(f"QPeftConfig: {name} must be words{needed}, got {shorten(words)}")
    if options["ask"] is not None and not options["ask"].strip():
        raise ValueError("QPeftConfig: ask must be a text that is not empty; leave it out for the usual one")
    for name in ("dropout", "margin"):
        _number(name, options[name])
    if not 0 <= options["dropout"] < 1:
        raise ValueError(f"QPeftConfig: dropout must be in [0, 1), got {options['dropout']!r}")
    if (temperature := options["temperature"]) != "auto":
        _number("temperature", temperature, "'auto' or a number above 0")
        if temperature <= 0:
            raise ValueError(f"QPeftConfig: temperature must be 'auto' or above 0, got {temperature!r}")
    if not isinstance(options["calibration"], dict | None):
        raise TypeError(f"QPeftConfig: calibration must be a table of numbers, got {shorten(options['calibration'])}")
    if options["base_model"] is not None:
        _expect_description(options["base_model"])


def names_of(given: object) -> tuple[Any, ...] | None:
    """Return one name or a collection of names as a tuple; None for anything else."""
    if isinstance(given, str):
        return (given,)
    return tuple(given) if isinstance(given, (tuple, list, set, frozenset)) else None


def at_least(name: str, value: object, least: int, most: int = 2**31 - 1) -> None:
    """Raises: TypeError for a value that is no int; ValueError for one that is not in [least, most]."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"QPeftConfig: {name} must be a whole number, got {shorten(value)}")
    if value < least:
        raise ValueError(f"QPeftConfig: {name} must be at least {least}, got {shorten(value)}")
    if value > most:
        raise ValueError(f"QPeftConfig: {name} must be at most {most}, got {shorten(value)}")


def _one_of(name: str, value: object, allowed: tuple[str, ...], otherwise: str = "") -> None:
    if value not in allowed:
        raise ValueError(
            f"QPeftConfig: {name} must be one of {', '.join(allowed)}{otherwise}, got {shorten(value)}"
            f"{did_you_mean(value, allowed)}"
        )


def _number(name: str, value: object, what: str = "a number") -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"QPeftConfig: {name} must be {what}, got {shorten(value)}")
    if not -1e300 < value < 1e300:  # nor NaN
        raise ValueError(f"QPeftConfig: {name} must be finite, got {shorten(value)}")


def _text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"QPeftConfig: {name} must be a text, got {shorten(value)}")
    if len(value) > _MAX_TEXT:
        raise ValueError(f"QPeftConfig: {name} must have at most {_MAX_TEXT} characters, got {len(value)}")


def _expect_description(lm: object) -> None:
    """Check the description of an LM that an adapter keeps (`adapters.own_lm.describe_lm`)."""
    if not isinstance(lm, dict) or not isinstance(lm.get("model_type"), str):
        raise ValueError(f"QPeftConfig: base_model must describe an LM, got {shorten(lm)}")
    for name in ("vocab_size", "hidden_size"):
        at_least(f"{name} of base_model", lm.get(name), 1)
    probe = lm.get("embedding_probe")
    if not isinstance(probe, list) or not all(type(x) in (int, float) and abs(x) < 1e38 for x in probe):
        raise ValueError(
            f"QPeftConfig: embedding_probe of base_model must be a list of finite numbers, got {shorten(probe)}"
        )
    revision = lm.get("revision")
    if revision is not None and not (isinstance(revision, str) and re.fullmatch(r"\w[\w.-]{0,99}", revision)):
        raise ValueError(f"QPeftConfig: revision of base_model must be a commit of the Hub, got {shorten(revision)}")
