"""Checks of what `QPeftTrainer` is given: arguments that would do nothing are refused, with what to set instead."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Mapping

import torch
from transformers import SchedulerType, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from ..lm.adapter import unsaved_parameters
from ..model import QPeftModel
from ..prefixes.index import PrefixIndex
from .examples import is_sized

logger = logging.getLogger(__name__)

# TrainingArguments that would do nothing here, or the wrong thing: (name, the value that is fine, what to do instead)
_UNSUPPORTED: tuple[tuple[str, object, str], ...] = (
    ("activation_checkpointing", False, "set suffix_micro_batch in QPeftConfig: the suffixes are then recomputed"),
    ("gradient_checkpointing", False, "set suffix_micro_batch in QPeftConfig: the suffixes are then recomputed"),
    ("auto_find_batch_size", False, "set suffix_micro_batch in QPeftConfig; the group of queries stays whole"),
    ("label_smoothing_factor", 0, "the losses of QPeftConfig have no labels"),
    ("neftune_noise_alpha", None, "the LM is frozen"),
    ("use_liger_kernel", False, "the likelihood is fused already, and the LM is restored after every pass"),
    ("torch_compile", False, "the engine's shapes change from step to step"),
    ("bf16_full_eval", False, "load the LM with dtype='bfloat16'; the clue module stays in float32"),
    ("fp16_full_eval", False, "load the LM with dtype='float16'; the clue module stays in float32"),
    ("deepspeed", None, "one GPU, or several with torchrun"),
    ("parallelism_config", None, "one GPU, or several with torchrun"),
    ("batch_eval_metrics", False, "compute_metrics is called once, with all queries"),
    ("include_for_metrics", [], "compute_metrics gets the scores and which documents are relevant"),
    ("include_num_input_tokens_seen", "no", "prefixes are read once for many pairs; counts.documents_read counts"),
    ("eval_do_concat_batches", True, "compute_metrics gets one table of all queries"),
)
# TrainingArguments that do nothing here, and harm nothing: said once
_WITHOUT_EFFECT: tuple[tuple[str, object, str], ...] = (
    ("label_names", None, "labels are those of the examples"),
    ("length_column_name", "length", "prefixes are sorted by length anyway"),
    ("average_tokens_across_devices", True, "the loss is the mean over the queries of all ranks"),
    ("use_cache", False, "cache_bytes and cache keep prefixes"),
    ("eval_accumulation_steps", None, "scores leave the device after every batch"),
    ("eval_use_gather_object", False, "scores are tensors"),
)

_PREFIXES_CHANGE = "its soft prompt, or what is trained in its LM, changes the prefixes with every step"

# arguments of `Trainer` that `QPeftTrainer` does not take -> why
_NOT_TAKEN = {
    "data_collator": "queries are put into groups by the trainer itself, see queries_per_group of QPeftConfig",
    "processing_class": "the model has its tokenizer: get_qpeft_model(lm, config, tokenizer)",
    "tokenizer": "the model has its tokenizer: get_qpeft_model(lm, config, tokenizer)",
    "model_init": "give a model; for several trials make a model and a trainer for each",
    "compute_loss_func": "the loss is that of QPeftConfig(loss=...)",
    "peft_config": "give the LM with its adapter to get_qpeft_model",
}


def refuse_others(others: Mapping[str, object], trainer: type) -> None:
    """Refuse arguments that the trainer does not have.

    Raises: TypeError that says why it is not taken, or which are.
    """
    for name in others:
        if name in _NOT_TAKEN:
            raise TypeError(f"QPeftTrainer does not take {name}: {_NOT_TAKEN[name]}")
        taken = [
            known
            for known, parameter in inspect.signature(trainer).parameters.items()
            if parameter.kind is not parameter.VAR_KEYWORD
        ]
        raise TypeError(f"QPeftTrainer does not take {name}; it takes {', '.join(taken)}")


def expect_model(model: object) -> None:
    """Raises: TypeError for what is no `QPeftModel`."""
    if not isinstance(model, QPeftModel):
        raise TypeError(
            f"QPeftTrainer: model must be a QPeftModel, as get_qpeft_model(lm, config) makes it, got "
            f"{type(model).__name__}"
        )


def expect_functions(**functions: object) -> None:
    """Raises: TypeError for an argument that is neither None nor a function."""
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"QPeftTrainer: {name} must be a function, got {type(function).__name__}")


def expect_trained(model: QPeftModel) -> None:
    """Raises: ValueError if no parameter of the model is trained."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "QPeftTrainer: nothing to train: the model has clues='none' or was loaded without "
            "is_trainable=True, and its LM has no trained adapter"
        )


def expect_main_process(dataset: object, args: TrainingArguments) -> None:
    """Check that worker processes do not read a stream, since each of them would read all of it.

    Raises: ValueError for an iterable of examples and ``dataloader_num_workers``.
    """
    if args.dataloader_num_workers and dataset is not None and not is_sized(dataset):
        raise ValueError(
            "QPeftTrainer: an iterable of examples is read in the main process; set dataloader_num_workers=0"
        )


def check_index(index: PrefixIndex, model: QPeftModel) -> None:
    """Raises: ValueError if training cannot read the prefixes of the index."""
    why = model.why_no_index
    if not why and model.engine.prefix_is_trained:
        why = _PREFIXES_CHANGE
    if why:
        raise ValueError(f"QPeftTrainer: an index is of no use to this model: {why}")
    index.expect_prompt(model.prompt)


def warn_of_cache(model: QPeftModel, evaluates: bool) -> None:
    """Say so if a cache is of no use; prefixes that are trained are kept in evaluations."""
    why = model.engine.why_not_cached
    if not why and model.engine.prefix_is_trained and not evaluates:
        why = _PREFIXES_CHANGE
    if why:
        logger.warning("QPeftTrainer: a cache is of no use to this model: %s", why)


def _is_set(args: TrainingArguments, name: str, fine: object) -> bool:
    value = getattr(args, name, fine)
    return value != fine and not (value is None or not value and not fine)  # None and False are as good as each other


def accelerator_config(args: TrainingArguments) -> AcceleratorConfig:
    """Return accelerate's settings, which `TrainingArguments` makes of whatever it is given."""
    assert isinstance(args.accelerator_config, AcceleratorConfig)
    return args.accelerator_config


def checked_arguments(args: TrainingArguments, model: QPeftModel) -> TrainingArguments:
    """Return a copy of the arguments that fits this model.

    Raises: ValueError for a setting that would be ignored, or would break a group of queries.
    """
    for name, fine, instead in _UNSUPPORTED:
        if _is_set(args, name, fine):
            raise ValueError(f"QPeftTrainer: {name}={getattr(args, name)!r} is not supported: {instead}")
    unused = [
        f"{name}={getattr(args, name)!r} ({why})" for name, fine, why in _WITHOUT_EFFECT if _is_set(args, name, fine)
    ]
    if unused:
        logger.warning("QPeftTrainer: without effect here: %s", ", ".join(unused))
    if args.lr_scheduler_type in ("constant", "reduce_lr_on_plateau") and args.warmup_steps:
        raise ValueError(
            f"QPeftTrainer: warmup_steps={args.warmup_steps} does nothing with lr_scheduler_type="
            f"{SchedulerType(args.lr_scheduler_type).value!r}; use constant_with_warmup, linear or cosine"
        )
    if getattr(args, "fsdp", None):
        raise ValueError("QPeftTrainer: fsdp is not supported: the LM is frozen, use torchrun without it")
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(
            "QPeftTrainer: train_sampling_strategy must be random or sequential, got "
            f"{args.train_sampling_strategy!r}; prefixes are sorted by length anyway"
        )
    group, size = model.qpeft_config.queries_per_group, args.per_device_train_batch_size
    if size % group:
        raise ValueError(
            f"QPeftTrainer: per_device_train_batch_size must be a multiple of queries_per_group, {group}, "
            f"got {size}: a group of queries that share their documents is never split"
        )
    if accelerator_config(args).split_batches:
        raise ValueError("QPeftTrainer: split_batches=True is not supported: it splits groups of queries over ranks")
    if any(parameter.is_inference() for parameter in model.lm.parameters()):
        raise ValueError(
            "QPeftTrainer: the LM was made in torch.inference_mode, and nothing can be trained through its weights; "
            "load it outside"
        )
    if not model.qpeft_config.train_lm and (unsaved := unsaved_parameters(model.lm)):
        raise ValueError(
            f"QPeftTrainer: weights of the LM require a gradient, but an adapter does not save them ({unsaved[0]}, "
            f"{len(unsaved)} in all); call lm.requires_grad_(False) before an adapter is put into it, or set "
            "train_lm=True in QPeftConfig"
        )
    dtype = model.engine.table.dtype
    for name, wanted in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if getattr(args, name) and dtype != wanted:
            raise ValueError(
                f"QPeftTrainer: {name}=True but the LM is in {str(dtype)[6:]}; the precision is the LM's "
                f"own: load it with load_lm(..., dtype={str(wanted)[6:]!r}), or leave {name} out"
            )
    args = copy.copy(args)
    args.accelerator_config = copy.deepcopy(args.accelerator_config)
    accelerator_config(args).dispatch_batches = False  # a batch is more than tensors: each rank reads its own
    if args.n_gpu > 1:
        logger.warning("%d GPUs are visible, one process uses one of them; torchrun uses all", args.n_gpu)
        args._n_gpu = 1
    args.bf16, args.fp16 = False, dtype == torch.float16 and args.device.type == "cuda"
    args.mixed_precision = "fp16" if args.fp16 else "no"
    # what a callback has counted (patience of early stopping) survives a kill
    args.restore_callback_states_from_checkpoint = True
    return args
