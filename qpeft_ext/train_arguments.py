"""Which `TrainingArguments` fit the training of clues: the others are refused, with what to set instead."""

from __future__ import annotations

import copy
import logging

import torch
from transformers import TrainingArguments

from .model import QPeftModel

logger = logging.getLogger(__name__)

# TrainingArguments that would do nothing here, or the wrong thing: (name, the value that is fine, what to do instead)
_UNSUPPORTED = (
    ("activation_checkpointing", False, "set suffix_micro_batch in QPeftConfig: the suffixes are then recomputed"),
    ("gradient_checkpointing", False, "set suffix_micro_batch in QPeftConfig: the suffixes are then recomputed"),
    ("auto_find_batch_size", False, "set suffix_micro_batch in QPeftConfig; the group of queries stays whole"),
    ("label_smoothing_factor", 0, "the losses of QPeftConfig have no labels"),
    ("neftune_noise_alpha", None, "the LM is frozen"),
    ("use_liger_kernel", False, "the LM is not patched; the likelihood is fused already"),
    ("torch_compile", False, "the engine's shapes change from step to step"),
    ("bf16_full_eval", False, "load the LM with dtype='bfloat16'; the clue module stays in float32"),
    ("fp16_full_eval", False, "load the LM with dtype='float16'; the clue module stays in float32"),
    ("deepspeed", None, "one GPU, or several with torchrun"),
)


def checked_arguments(args: TrainingArguments, model: QPeftModel) -> TrainingArguments:
    """A copy of the arguments, fit for this model.

    Raises: ValueError for a setting that would be ignored, or would break a group of queries.
    """
    for name, fine, instead in _UNSUPPORTED:
        if (getattr(args, name, None) or fine) != fine:
            raise ValueError(f"QPeftTrainer: {name}={getattr(args, name)!r} is not supported: {instead}")
    if getattr(args, "fsdp", None):
        raise ValueError("QPeftTrainer: fsdp is not supported: the LM is frozen, use torchrun without it")
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError("QPeftTrainer: train_sampling_strategy must be random or sequential, got "
                         f"{args.train_sampling_strategy!r}; prefixes are sorted by length anyway")
    group, size = model.qpeft_config.queries_per_group, args.per_device_train_batch_size
    if size % group:
        raise ValueError(f"QPeftTrainer: per_device_train_batch_size must be a multiple of queries_per_group, {group}, "
                         f"got {size}: a group of queries that share their documents is never split")
    if args.accelerator_config.split_batches:
        raise ValueError("QPeftTrainer: split_batches=True is not supported: it splits groups of queries over ranks")
    if not (model.qpeft_config.train_lm or hasattr(model.lm, "peft_config")) and \
            any(parameter.requires_grad for parameter in model.lm.parameters()):
        raise ValueError("QPeftTrainer: weights of the LM require a gradient, but an adapter does not save them; call "
                         "lm.requires_grad_(False), or set train_lm=True in QPeftConfig")
    dtype = model.engine.table.dtype
    for name, wanted in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if getattr(args, name) and dtype != wanted:
            raise ValueError(f"QPeftTrainer: {name}=True but the LM is in {str(dtype)[6:]}; the precision is the LM's "
                             f"own: load it with load_lm(..., dtype={str(wanted)[6:]!r}), or leave {name} out")
    args = copy.copy(args)
    args.accelerator_config = copy.deepcopy(args.accelerator_config)
    args.accelerator_config.dispatch_batches = False  # a batch is more than tensors: each rank reads its own
    if args.n_gpu > 1:
        logger.warning("%d GPUs are visible, one process uses one of them; torchrun uses all", args.n_gpu)
        args._n_gpu = 1
    args.bf16, args.fp16 = False, dtype == torch.float16 and args.device.type == "cuda"
    args.mixed_precision = "fp16" if args.fp16 else "no"
    # what a callback has counted (patience of early stopping) survives a kill
    args.restore_callback_states_from_checkpoint = True
    return args
