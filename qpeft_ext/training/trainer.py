"""`QPeftTrainer`: trains the clue module, and an adapter in the LM if there is one, with transformers' Trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, TrainOutput

from ..config import QPeftConfig
from ..engine.filling import CacheFilling
from ..model import QPeftModel
from ..prefixes.cache import DocumentCache
from ..utils.inputs import true_or_false
from ..utils.memory import retry_with_less
from ..utils.optional import expect_packages
from ..utils.torch_state import own_state
from .arguments import (
    check_index,
    checked_arguments,
    expect_functions,
    expect_main_process,
    expect_model,
    expect_trained,
    refuse_others,
    warn_of_cache,
)
from .budget import PassBudget
from .counts import StepCounts
from .evaluation import LOSS_TABLES, Evaluation, computed_metrics, query_measures
from .examples import EVALUATION, TRAINING, checked_dataset
from .group_trainer import EpochOfOrder, GroupTrainer
from .losses import configured_loss, needs_temperature
from .resumable import ResumableTrainer
from .sampling import first_members
from .temperature import AUTO, QUERIES, best_temperature

logger = logging.getLogger(__name__)


class QPeftTrainer(GroupTrainer, ResumableTrainer):
    """A `transformers.Trainer` for query-dependent adapters.

    A device batch is one or more groups of ``config.queries_per_group`` queries. Each query brings one positive and
    ``config.num_hard_negatives`` negatives; with ``config.in_batch_negatives`` the documents of the group's other
    queries are negatives too, unless they are relevant. The draw is a function of (seed, epoch, example) only.
    Evaluation ranks an example's own positives and all its negatives: ``eval_loss``, ``eval_accuracy`` (a positive is
    first), ``eval_mrr``.

    Under torchrun every rank reads its own groups, and a step is the one that a single device would make of the same
    queries: the loss and its gradient are means over the queries of all ranks, uneven last batches included.

    ``config.temperature="auto"`` is replaced by a number before the first step (or evaluation): the one that gives the
    lowest loss on 64 training queries, as the model is then; see `training.temperature` for the reason.

    Precision is that of the LM: load it with ``dtype="bfloat16"`` to train in bf16. The clue module has float32
    weights and is never autocast; ``args.bf16`` and ``args.fp16`` may be set, but must agree with the LM. A float16 LM
    on a GPU gets loss scaling.

    A step that does not fit in the device's memory is tried again in smaller parts, which gives the same gradient and
    takes longer (one process only).

    Args:
        model: `QPeftModel`.
        args: `TrainingArguments`; ``per_device_train_batch_size`` (in queries) is a multiple of ``queries_per_group``.
        train_dataset: examples (see `training.examples`): a list, a `datasets.Dataset`, or an iterable that can be read
            again and again; then ``max_steps`` is needed, and the order is its own.
        eval_dataset: examples too, or a dict of several sets of them.
        callbacks, optimizers, optimizer_cls_and_kwargs: as in `Trainer`.
        compute_metrics: a function of an `EvalPrediction` that gives a dict of numbers, reported as ``eval_<name>`` and
            available to ``metric_for_best_model``. ``predictions``, [Q, C] float32, has ℓ of each example's documents,
            the positives first, and −inf where an example has fewer than C; ``label_ids``, [Q, C] int64, has 1 for a
            positive, 0 for a negative and −100 there. `predict` returns the same two.
        preprocess_logits_for_metrics: a function (scores [q, C], labels [q, C]) of the tensors of a batch; the tensor
            that it returns, with q rows, takes the place of the scores.
        cache_bytes: budget of a `DocumentCache` that keeps the prefixes of documents from epoch to epoch; 0 (the
            default) keeps none. Only prefixes without gradient are kept: while a soft prompt or an adapter in the LM is
            trained, those of an evaluation and none of the training.
        cache: a `DocumentCache` of your own instead, e.g. one with an index, ``DocumentCache(1 << 30, index=FOLDER)``:
            documents that ``qpeft index`` has read are not read again. One that takes half the memory has a
            ``kv_dtype``; no gradient goes through what it keeps.
        deterministic: compute every prefix, clue and suffix unpadded and one per pass, so that a resumed run ends
            bit-equal on the CPU (same machine and threads). Slower.
        truncate_queries: cut a query that is longer than ``max_query_tokens`` at its end, instead of an error.

    Attributes:
        counts: `StepCounts`, what the training steps have read.

    Raises: ValueError for bad examples (with their index) and arguments that do not fit; TypeError for an argument of
        `Trainer` that is not taken.

    Example:
        >>> import transformers
        >>> import qpeft_ext as qpeft
        >>> from qpeft_ext.lm.loading import BASE_LM  # the small LM of the demo; any causal LM will do
        >>> transformers.utils.logging.set_verbosity_error()
        >>> texts = {"sort a list": "sorted returns a new list", "read a file": "open gives a file object"}
        >>> examples = [
        ...     {"query": query, "positives": [text], "negatives": ["raised when an import fails"]}
        ...     for query, text in texts.items()
        ... ]
        >>> model = qpeft.get_qpeft_model(qpeft.load_lm(BASE_LM), qpeft.QPeftConfig(queries_per_group=2))
        >>> args = transformers.TrainingArguments(
        ...     "checkpoints", max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, use_cpu=True,
        ...     save_strategy="no", report_to="none", disable_tqdm=True,
        ... )
        >>> trainer = qpeft.QPeftTrainer(model, args, examples, eval_dataset=examples)
        >>> trainer.remove_callback(transformers.PrinterCallback)  # which prints all logs
        >>> losses = [trainer.evaluate()["eval_loss"]]
        >>> steps = trainer.train().global_step
        >>> losses.append(trainer.evaluate()["eval_loss"])
        >>> print(f"{steps} steps, loss {losses[0]:.1f} -> {losses[1]:.1f}")
        2 steps, loss 2.9 -> 1.1
        >>> model.save_pretrained("my-adapter")
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the queries of the whole optimiser step

    def __init__(
        self,
        model: QPeftModel,
        args: TrainingArguments | None = None,
        train_dataset: Sequence | Iterable | None = None,
        eval_dataset: Sequence | Iterable | dict | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        cache_bytes: int = 0,
        deterministic: bool = False,
        cache: DocumentCache | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        optimizer_cls_and_kwargs: tuple | None = None,
        truncate_queries: bool = False,
        **others: Any,
    ) -> None:
        expect_packages("QPeftTrainer", {"accelerate": "train"})
        refuse_others(others, QPeftTrainer)
        expect_model(model)
        expect_functions(compute_metrics=compute_metrics, preprocess_logits_for_metrics=preprocess_logits_for_metrics)
        args = checked_arguments(args or TrainingArguments("qpeft-checkpoints"), model)
        expect_trained(model)
        train_dataset = checked_dataset(train_dataset, TRAINING, model.qpeft_config)
        eval_dataset = checked_dataset(eval_dataset, EVALUATION)
        for dataset in (train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])):
            expect_main_process(dataset, args)
        if cache is not None and cache_bytes:
            raise ValueError("QPeftTrainer: cache and cache_bytes exclude each other")
        self.cache = DocumentCache(cache_bytes) if cache_bytes else cache
        if self.cache is not None and self.cache.index is not None:
            check_index(self.cache.index, model)
        elif self.cache is not None:
            warn_of_cache(model, eval_dataset is not None)
        self.deterministic = true_or_false(deterministic, "QPeftTrainer: deterministic")
        self._budget = PassBudget(model)
        self.counts = StepCounts()
        self._truncate_queries = true_or_false(truncate_queries, "QPeftTrainer: truncate_queries")
        devices = set((getattr(model.lm, "hf_device_map", None) or {}).values())
        if len(devices) > 1:
            model.hf_device_map = model.lm.hf_device_map  # the trainer then leaves the LM where it is
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[EpochOfOrder(self), *(callbacks or [])],
            optimizers=optimizers,
            compute_metrics=compute_metrics,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Ask for the loss scaling of fp16 without its autocast: LM and clue module keep their dtypes."""
        from accelerate.utils import AutocastKwargs

        arguments = super()._build_accelerator_args(**kwargs)
        arguments["kwargs_handlers"] = [*arguments.get("kwargs_handlers", ()), AutocastKwargs(enabled=False)]
        return arguments

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The configured loss; its gradients add up to those of the mean over all queries of the optimiser step."""
        table, queries = self._likelihood_table(model, inputs), inputs["queries"]
        loss = configured_loss(self._config, table, *(inputs[name] for name in LOSS_TABLES))
        if not torch.isfinite(loss):
            raise ValueError(
                f"the loss of step {self.state.global_step + 1} is not finite; train with a lower "
                "learning rate, or load the LM in bfloat16 or float32"
            )
        self.counts.add(inputs)
        if num_items_in_batch is not None:
            # ranks are averaged afterwards
            loss = loss * (queries * self.accelerator.num_processes / num_items_in_batch)
        return (loss, {"likelihood": table}) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Do what `Trainer` does; the loss it returns, which is what the trainer reports, is that of all ranks."""
        loss = self._step_within_memory(model, inputs, num_items_in_batch)
        return self.accelerator.reduce(loss, "mean") if self.args.world_size > 1 else loss

    def _step_within_memory(self, model, inputs, num_items_in_batch) -> Tensor:
        """A step of `Trainer`; when the device runs out of memory it is tried again with half of it at a time.

        The gradient is the same: suffixes then are computed twice, in micro-batches, as with ``suffix_micro_batch``.
        Several processes do not try again, since they would wait for each other.
        """
        parameters = [p for p in model.parameters() if p.requires_grad]
        accumulated = [None if p.grad is None else p.grad.clone() for p in parameters]
        counts = replace(self.counts)
        tries = count()

        def step() -> Tensor:
            if next(tries):  # the try before may have added a part of the gradient
                for parameter, gradient in zip(parameters, accumulated, strict=True):
                    parameter.grad = None if gradient is None else gradient.clone()
                self.counts = replace(counts)
            return super(QPeftTrainer, self).training_step(model, inputs, num_items_in_batch)

        return retry_with_less(step, lambda: self.args.world_size == 1 and self._budget.halve(len(inputs["pairs"])))

    def _likelihood_table(self, model, inputs) -> Tensor:
        """ℓ of every query and document (`losses`), [Q, M] float32."""
        batch, tokens, cache = inputs["pairs"], self._budget.max_tokens, self.cache
        with_grad = torch.is_grad_enabled() and self.model.engine.prefix_is_trained
        prefilled = False
        if cache is not None and not with_grad:
            with self.model.passes():
                prefilled = CacheFilling(self.model.engine, cache, self.deterministic).fill(batch, tokens)
        scores = model(
            batch,
            cache=cache,
            deterministic=self.deterministic,
            max_tokens_per_batch=tokens,
            prefilled=prefilled,
            max_pairs_per_batch=self._budget.max_pairs if torch.is_grad_enabled() else None,
        )
        return scores.compared[inputs["pair"]]

    @own_state()
    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Means over the queries of the loss and, where there are negatives, of accuracy and reciprocal rank; and what
        ``compute_metrics`` makes of the scores."""
        training = self.model.training
        self.model.eval()
        given: Any = dataloader.dataset  # what `evaluate` was given, where the trainer has no data set of its own
        given = getattr(given, "dataset", given)  # of several processes each has a shard of a stream
        datasets = (self.train_dataset, self.eval_dataset, given.examples)
        self._settle_temperature(next(dataset for dataset in datasets if dataset is not None))
        self.callback_handler.eval_dataloader = dataloader
        loss_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        evaluation = Evaluation(
            self.accelerator, self.args.eval_batch_size, not loss_only, self.preprocess_logits_for_metrics
        )
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            table = self._likelihood_table(self.model, inputs)
            if not torch.isfinite(table).all():
                raise ValueError(
                    "an evaluation score is not finite; train with a lower learning rate, or load the LM in "
                    "bfloat16 or float32"
                )
            evaluation.add(self._measures(table, inputs), table, inputs)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        self.model.train(training)
        metrics, num_queries = evaluation.means()
        if not num_queries:
            raise ValueError(f"QPeftTrainer: there are no examples to evaluate ({description.lower()})")
        scores: Any = None
        labels: Any = None
        if evaluation.predictions is not None:
            scores, labels = evaluation.predictions.arrays()
            computed = computed_metrics(self.compute_metrics, EvalPrediction(scores, labels))
            metrics |= computed | {"loss": metrics["loss"]}
        prefixed = {
            name if name.startswith(f"{metric_key_prefix}_") else f"{metric_key_prefix}_{name}": value
            for name, value in metrics.items()
        }
        return EvalLoopOutput(predictions=scores, label_ids=labels, metrics=prefixed, num_samples=num_queries)

    def _measures(self, table: Tensor, inputs: dict[str, Any]) -> Tensor:
        return query_measures(self._config, table, inputs)

    @own_state()
    @torch.enable_grad()
    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train; see `Trainer.train`.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the last complete one in ``args.output_dir``: one
                that a kill has cut short is passed over.
            trial, ignore_keys_for_eval: as in `Trainer`.
        Raises: ValueError if the folder is not a complete checkpoint, or with True if there is none.
        """
        checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        self._settle_temperature(self.train_dataset, checkpoint)
        self.counts = StepCounts()
        set_seed(self.args.seed)  # dropout then depends on nothing that was drawn since the trainer was made
        result = super().train(checkpoint, trial, ignore_keys_for_eval)
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.model.eval()
        self.counts.warn(self._config)
        if checkpoint is not None and not self.counts.queries_read:
            logger.warning("%s has all %d steps: nothing more was trained", checkpoint, self.state.global_step)
        return result

    @torch.no_grad()
    def _settle_temperature(self, dataset: Any, checkpoint: str | None = None) -> None:
        """Replace "auto" by a number, the same on all ranks: that of the checkpoint, or a fitted one."""
        config = self._config
        if config.temperature != AUTO or not needs_temperature(config) or dataset is None:
            return
        if checkpoint is not None:
            config.temperature = QPeftConfig.from_pretrained(checkpoint).temperature
            return
        training = self.model.training
        self.model.eval()
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()))
        members = first_members(dataset, config, self._data_seed, self._shuffles, QUERIES)
        collate, size = self._collators[True], config.queries_per_group
        groups = (self._prepare_inputs(collate(members[i : i + size])) for i in range(0, len(members), size))
        tables = [
            (self._likelihood_table(self.model, inputs), *(inputs[name] for name in LOSS_TABLES)) for inputs in groups
        ]
        config.temperature = best_temperature(config, tables)
        self.model.train(training)
        logger.info("temperature of the loss: %g, fitted on %d queries", config.temperature, len(members))
