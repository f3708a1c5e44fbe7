"""How batches differ from those of transformers' Trainer: they are groups of queries that share their documents."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback

from ..config import DISTILLATION, QPeftConfig
from ..model import QPeftModel
from .arguments import expect_main_process
from .collator import GroupCollator
from .examples import is_sized
from .sampling import (
    EpochOrder,
    EvaluationExamples,
    StreamedEvaluationExamples,
    StreamedTrainingExamples,
    TrainingExamples,
)


class GroupTrainer(Trainer):
    """A `Trainer` of a `QPeftModel` whose batches are made by `GroupCollator`, in the order of `EpochOrder`.

    Attributes: order: the order of the training examples.
    """

    model: QPeftModel
    order: EpochOrder
    _truncate_queries: bool

    @property
    def _config(self) -> QPeftConfig:
        """The model's options."""
        return self.model.qpeft_config

    @cached_property
    def _collators(self) -> dict[bool, GroupCollator]:
        """Collators of training (True) and of evaluation, where every query has its own documents only."""
        prompt, config, truncate = self.model.prompt, self._config, self._truncate_queries
        taught_by = config.loss if config.loss in DISTILLATION else ""
        return {
            True: GroupCollator(prompt, config.queries_per_group, config.in_batch_negatives, taught_by, truncate),
            False: GroupCollator(prompt, 1, False, taught_by, truncate),
        }

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ) -> DataLoader:
        expect_main_process(dataset, self.args)
        examples: Dataset
        if is_training:
            kind = TrainingExamples if is_sized(dataset) else StreamedTrainingExamples
            config = self._config
            examples = kind(dataset, config.num_hard_negatives, self._data_seed, config.num_random_negatives)
        elif is_sized(dataset):
            examples = EvaluationExamples(dataset)
        else:
            examples = StreamedEvaluationExamples(dataset, batch_size * self.args.world_size)
        self.data_collator = self._collators[is_training]
        return super()._get_dataloader(examples, description, batch_size, sampler_fn, is_training, dataloader_key)

    def get_test_dataloader(self, test_dataset) -> DataLoader:
        if isinstance(test_dataset, Mapping):
            raise ValueError(
                f"QPeftTrainer: predict takes one set of examples, got a dict of {', '.join(map(str, test_dataset))}; "
                "call it for each of them"
            )
        return self.get_eval_dataloader(test_dataset)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise NotImplementedError: transformers makes a model for each trial through ``model_init``."""
        raise NotImplementedError(
            "QPeftTrainer has no hyperparameter_search; make a model and a trainer for each trial, around the same LM, "
            "and return evaluate()['eval_loss'] to optuna or Ray Tune"
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        unpadded = self.args.world_size == 1 or self.args.dataloader_drop_last
        multiple = 1 if unpadded else self.args.train_batch_size * self.args.world_size
        examples: Any = train_dataset or self.train_dataset
        if self.args.dataloader_drop_last and len(examples) < (
            least := self.args.train_batch_size * self.args.world_size
        ):
            raise ValueError(
                f"QPeftTrainer: dataloader_drop_last=True leaves out all training examples ({len(examples)}), since a "
                f"batch has {least}; leave it out, or lower per_device_train_batch_size"
            )
        self.order = EpochOrder(len(examples), self._data_seed, self._shuffles, multiple)
        return self.order

    def _get_eval_sampler(self, eval_dataset: Any) -> EpochOrder:
        multiple = self.args.eval_batch_size * self.args.world_size
        return EpochOrder(len(eval_dataset), 0, shuffle=False, multiple=multiple)

    def _get_collator_with_removed_columns(self, data_collator, description=None):
        return data_collator  # an example's keys are not arguments of forward, and none of them is unused

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    @property
    def _shuffles(self) -> bool:
        return self.args.train_sampling_strategy == "random"

    def _get_num_items_in_batch(self, batch_samples: list[dict], device: torch.device) -> Tensor | None:
        """Queries of all batches, on all ranks, that one optimiser step accumulates."""
        queries = torch.tensor(sum(batch["queries"] for batch in batch_samples), device=device)
        return self.accelerator.gather(queries).sum() if self.args.world_size > 1 else queries


class EpochOfOrder(TrainerCallback):
    """Tells the order of examples which epoch begins: in a resumed run on many ranks accelerate does not reach it."""

    def __init__(self, trainer: GroupTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs) -> None:
        if is_sized(self.trainer.train_dataset):
            steps = -(-len(train_dataloader) // args.gradient_accumulation_steps)
            self.trainer.order.set_epoch(state.global_step // steps)
