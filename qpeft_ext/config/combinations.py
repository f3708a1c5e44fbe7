"""Options that exclude each other, or do nothing without another: a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .values import DEFAULT_INSTRUCTION, DISTILLATION, WRITTEN_TEMPLATES

Check = tuple[Callable[[Any], bool], str]  # when a `QPeftConfig` is impossible, and why


def _if_set(names: str, excluded: Callable[[Any], bool], message: str) -> list[Check]:
    """Return a check for each of the names: its option must keep its default where ``excluded`` is true."""

    def check(name: str) -> Check:
        return lambda c: excluded(c) and c.is_set(name), message.replace("NAME", name)

    return [check(name) for name in names.split()]


CHECKS: tuple[Check, ...] = (
    *_if_set(
        "source clue_embeddings score_gate similarity selection",
        lambda c: c.clues != "top_k",
        "NAME={c.NAME!r} needs clues='top_k', got clues={c.clues!r}",
    ),
    *_if_set(
        "residual",
        lambda c: c.clues == "none",
        "residual=False is of the clue MLP, but clues='none' has none; leave it out",
    ),
    *_if_set(
        "soft_prompt_init soft_prompt_mlp",
        lambda c: c.num_virtual_tokens is None,
        "NAME={c.NAME!r} is of a soft prompt; set num_virtual_tokens",
    ),
    (
        lambda c: c.layout == "clues_first" and c.clues == "none",
        "layout='clues_first' says where the clues go, but clues='none' has none; leave layout out",
    ),
    (
        lambda c: c.layout == "clues_first" and c.num_virtual_tokens is not None,
        "layout='clues_first' has its instruction as text; leave num_virtual_tokens out",
    ),
    (
        lambda c: c.template == "upr" and c.instruction != DEFAULT_INSTRUCTION,
        "template='upr' has an instruction of its own; leave instruction out, or set template='qpeft'",
    ),
    *_if_set(
        "num_virtual_tokens layout",
        lambda c: c.template == "upr",
        "template='upr' has its instruction behind the passage; leave NAME out",
    ),
    (
        lambda c: c.template == "chat" and c.layout == "clues_first",
        "template='chat' has the clues behind the passage; leave layout out",
    ),
    (
        lambda c: c.template in WRITTEN_TEMPLATES and c.layout == "query_first",
        "template={c.template!r} has the document first; leave layout out, or name a template that has the query first",
    ),
    (
        lambda c: c.layout == "query_first" and c.score == "both",
        "score='both' reads the likelihood of the query, which stands before the document here; set score='yes_no'",
    ),
    *_if_set(
        "num_virtual_tokens",
        lambda c: c.template not in WRITTEN_TEMPLATES,
        "this template has no place for a soft prompt; leave NAME out",
    ),
    *_if_set(
        "generated_lora_rank",
        lambda c: c.layout == "query_first",
        "layout='query_first' has the document in what a generated LoRA changes; leave NAME out",
    ),
    (
        lambda c: c.template == "chat" and c.special_tokens == "bos",
        "template='chat' has the special tokens of the chat template; leave special_tokens out",
    ),
    *_if_set(
        "ask exact_words",
        lambda c: c.score == "likelihood",
        "NAME={c.NAME!r} is of a score that asks for an answer; set score='yes_no', 'graded' or 'both'",
    ),
    *_if_set(
        "yes_words no_words",
        lambda c: c.score not in ("yes_no", "both"),
        "NAME={c.NAME!r} are of score='yes_no' and 'both', got score={c.score!r}; leave NAME out",
    ),
    *_if_set(
        "max_grade",
        lambda c: c.score != "graded",
        "max_grade={c.max_grade!r} is of score='graded', got score={c.score!r}; leave max_grade out",
    ),
    (
        lambda c: c.loss == "binary_cross_entropy" and c.score != "yes_no",
        "loss='binary_cross_entropy' is of log-odds; set score='yes_no', got score={c.score!r}",
    ),
    (
        lambda c: c.loss in ("pointwise", "pointwise_pairwise") and c.score != "likelihood",
        "loss={c.loss!r} makes queries likely, which score={c.score!r} is not about; use listwise, or for yes_no "
        "binary_cross_entropy",
    ),
    (
        lambda c: c.train_lm and (c.clues != "none" or c.generated_lora_rank is not None),
        "train_lm=True needs clues='none' and no generated LoRA: both read an embedding table and weights that are "
        "frozen",
    ),
    *_if_set(
        "target_modules",
        lambda c: c.generated_lora_rank is None,
        "target_modules are those of the generated LoRA; set generated_lora_rank",
    ),
    (
        lambda c: c.generated_lora_rank is not None and c.loss == "pointwise",
        "loss='pointwise' alone would teach the generated LoRA the query itself, whatever the document; use "
        "pointwise_pairwise or another loss with negatives",
    ),
    (
        lambda c: c.loss == "contrastive" and not (c.in_batch_negatives and c.queries_per_group > 1),
        "loss='contrastive' compares the queries and documents of a group; set in_batch_negatives=True and "
        "queries_per_group to 2 or more",
    ),
    (
        lambda c: c.loss in DISTILLATION and (c.in_batch_negatives or c.num_random_negatives > 0),
        "loss={c.loss!r} learns from teacher scores, which documents of other examples do not have; set "
        "in_batch_negatives=False and num_random_negatives=0",
    ),
    (
        lambda c: c.selection == "random" and c.source.startswith("vocabulary"),
        "selection='random' needs source='document' or 'candidates', got source={c.source!r}: random tokens of the "
        "vocabulary say nothing about any text",
    ),
    (
        lambda c: c.selection == "random" and c.score_gate,
        "selection='random' has no scores that score_gate=True could train; set one of them only",
    ),
)
