"""`QPeftTrainer`: trains the clue module, and an adapter in the LM if there is one, with transformers' Trainer."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, denumpify_detensorize

from ..adapters.files import load_weights_into
from ..config import QPeftConfig
from ..engine.filling import CacheFilling
from ..engine.schedule import default_tokens
from ..formats.example_keys import table_rows, view
from ..model import QPeftModel
from ..prefixes.cache import DocumentCache
from ..prefixes.index import PrefixIndex
from ..utils.memory import retry_with_less
from ..utils.torch_state import own_state
from .arguments import checked_arguments, refuse_others
from .checkpoints import last_complete, mark_complete, rotate, why_incomplete
from .collator import GroupCollator
from .examples import EVALUATION, TRAINING, check_example, lacking_negatives
from .losses import configured_loss, needs_temperature
from .predictions import Predictions
from .sampling import (
    EpochOrder,
    EvaluationExamples,
    StreamedEvaluationExamples,
    StreamedTrainingExamples,
    TrainingExamples,
)
from .temperature import AUTO, best_temperature

logger = logging.getLogger(__name__)

_QUERIES_FOR_TEMPERATURE = 64
_LOSS_TABLES = ("positive", "mask", "document", "teacher_scores")  # of `GroupCollator`, in the order of the loss


class QPeftTrainer(Trainer):
    """A `transformers.Trainer` for query-dependent adapters.

    A device batch is one or more groups of ``config.queries_per_group`` queries. Each query brings one positive and
    ``config.num_hard_negatives`` negatives; with ``config.in_batch_negatives`` the documents of the group's other
    queries are negatives too, unless they are relevant. What is drawn is a function of (seed, epoch, example) alone.
    Evaluation ranks an example's own positives and all its negatives: ``eval_loss``, ``eval_accuracy`` (a positive is
    first), ``eval_mrr``.

    Under torchrun every rank reads its own groups, and a step is the one that a single device would make of the same
    queries: the loss and its gradient are means over the queries of all ranks, uneven last batches included.

    ``config.temperature="auto"`` is replaced by a number before the first step (or evaluation): the one that gives the
    lowest loss on 64 training queries, as the model is then; `temperature` says why.

    Precision is that of the LM: load it with ``dtype="bfloat16"`` to train in bf16. The clue module has float32
    weights and is never autocast; ``args.bf16`` and ``args.fp16`` may be set, but must agree with the LM. A float16 LM
    on a GPU gets loss scaling.

    Args:
        model: `QPeftModel`.
        args: `TrainingArguments`; ``per_device_train_batch_size`` (in queries) is a multiple of ``queries_per_group``.
        train_dataset, eval_dataset: examples (see `examples`): a list, a `datasets.Dataset`, or an iterable that can be
            read again and again (then ``max_steps`` is needed, and the order is its own). ``eval_dataset`` may be a
            dict of them.
        callbacks, optimizers, optimizer_cls_and_kwargs: as in `Trainer`.
        compute_metrics: a function of an `EvalPrediction` that gives a dict of numbers, reported as ``eval_<name>`` and
            good for ``metric_for_best_model``. ``predictions``, [Q, C] float32, has ℓ of each example's documents, the
            positives first, and −inf where an example has fewer than C; ``label_ids``, [Q, C] int64, has 1 for a
            positive, 0 for a negative and −100 there. `predict` returns the same two.
        preprocess_logits_for_metrics: (scores [q, C], labels [q, C]), tensors of a batch → what takes the place of the
            scores, a tensor with q rows.
        cache_bytes: budget of a `DocumentCache` that keeps the prefixes of documents from epoch to epoch; 0 (the
            default) keeps none. Only prefixes without gradient are kept: while a soft prompt or an adapter in the LM is
            trained, those of an evaluation and none of the training.
        cache: a `DocumentCache` of your own instead, e.g. one with an index, ``DocumentCache(1 << 30, index=FOLDER)``:
            documents that ``qpeft index`` has read are not read again.
        deterministic: every prefix, clue and suffix alone and unpadded, so that a resumed run ends bit-equal on the
            CPU (same machine and threads). Slower.
        truncate_queries: cut a query that is longer than ``max_query_tokens`` at its end, instead of an error.

    Attributes: cache: the `DocumentCache`, or None.  documents_read, documents_cut, queries_cut: counts over the
        training steps.
    Raises: ValueError for bad examples (with their index) and arguments that do not fit; TypeError for an argument of
        `Trainer` that is not taken.
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
        **others,
    ) -> None:
        refuse_others(others, QPeftTrainer)
        if not isinstance(model, QPeftModel):
            raise TypeError(
                f"QPeftTrainer: model must be a QPeftModel, as get_qpeft_model(lm, config) makes it, got "
                f"{type(model).__name__}"
            )
        for name, function in (
            ("compute_metrics", compute_metrics),
            ("preprocess_logits_for_metrics", preprocess_logits_for_metrics),
        ):
            if function is not None and not callable(function):
                raise TypeError(f"QPeftTrainer: {name} must be a function, got {type(function).__name__}")
        config = model.qpeft_config
        args = checked_arguments(args or TrainingArguments("qpeft-checkpoints"), model)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                "QPeftTrainer: nothing to train: the model has clues='none' or was loaded without "
                "is_trainable=True, and its LM has no trained adapter"
            )
        train_dataset, eval_dataset = table_rows(train_dataset), table_rows(eval_dataset)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: table_rows(part) for name, part in eval_dataset.items()}
        _check_dataset(train_dataset, TRAINING, config)
        for part in eval_dataset.values() if isinstance(eval_dataset, dict) else (eval_dataset,):
            _check_dataset(part, EVALUATION)
        if args.dataloader_num_workers and train_dataset is not None and not _is_sized(train_dataset):
            raise ValueError(
                "QPeftTrainer: an iterable of examples is read in the main process; set dataloader_num_workers=0"
            )
        if cache is not None and cache_bytes:
            raise ValueError("QPeftTrainer: cache and cache_bytes exclude each other")
        self.cache = DocumentCache(cache_bytes) if cache_bytes else cache
        if self.cache is not None and self.cache.index is not None:
            _check_index(self.cache.index, model)
        self.deterministic = deterministic
        self._max_tokens_per_batch = default_tokens(model.device)
        self._max_pairs_per_batch: int | None = None  # a number after an out-of-memory error
        self.documents_read = self.documents_cut = self.queries_cut = 0
        needs_scores = config.loss == "margin_mse"
        self._collators = {
            True: GroupCollator(
                model.prompt, config.queries_per_group, config.in_batch_negatives, needs_scores, truncate_queries
            ),
            False: GroupCollator(model.prompt, 1, False, needs_scores, truncate_queries),
        }
        devices = set((getattr(model.lm, "hf_device_map", None) or {}).values())
        if len(devices) > 1:
            model.hf_device_map = model.lm.hf_device_map  # the trainer then leaves the LM where it is
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[_EpochOfOrder(self), *(callbacks or [])],
            optimizers=optimizers,
            compute_metrics=compute_metrics,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )

    # -- data ----------------------------------------------------------------------------------------------------

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ) -> DataLoader:
        config, seed = self.model.qpeft_config, self._data_seed
        if is_training:
            kind = TrainingExamples if _is_sized(dataset) else StreamedTrainingExamples
            examples = kind(dataset, config.num_hard_negatives, seed, config.num_random_negatives)
        elif _is_sized(dataset):
            examples = EvaluationExamples(dataset)
        else:
            examples = StreamedEvaluationExamples(dataset, batch_size * self.args.world_size)
        self.data_collator = self._collators[is_training]
        return super()._get_dataloader(examples, description, batch_size, sampler_fn, is_training, dataloader_key)

    def get_test_dataloader(self, test_dataset) -> DataLoader:
        return self.get_eval_dataloader(test_dataset)

    def _get_train_sampler(self, train_dataset: TrainingExamples | None = None) -> Sampler:
        shuffle = self.args.train_sampling_strategy == "random"
        alone = self.args.world_size == 1 or self.args.dataloader_drop_last
        multiple = 1 if alone else self.args.train_batch_size * self.args.world_size
        self.order = EpochOrder(len(train_dataset or self.train_dataset), self._data_seed, shuffle, multiple)
        return self.order

    def _get_eval_sampler(self, eval_dataset: EvaluationExamples) -> Sampler:
        return EpochOrder(
            len(eval_dataset), 0, shuffle=False, multiple=self.args.eval_batch_size * self.args.world_size
        )

    def _get_collator_with_removed_columns(self, data_collator, description=None):
        return data_collator  # an example's keys are not arguments of forward, and none of them is unused

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    # -- loss ----------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list[dict], device: torch.device) -> Tensor | None:
        """Queries of all batches, on all ranks, that one optimiser step accumulates."""
        queries = torch.tensor(sum(batch["queries"] for batch in batch_samples), device=device)
        return self.accelerator.gather(queries).sum() if self.args.world_size > 1 else queries

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The configured loss; its gradients add up to those of the mean over all queries of the optimiser step."""
        table = self._likelihood_table(model, inputs)
        config, queries = self.model.qpeft_config, inputs["queries"]
        loss = configured_loss(config, table, *(inputs[name] for name in _LOSS_TABLES))
        if not torch.isfinite(loss):
            raise ValueError(
                f"the loss of step {self.state.global_step + 1} is not finite; train with a lower "
                "learning rate, or load the LM in bfloat16 or float32"
            )
        prefixes = inputs["pairs"].documents if queries else []
        self.documents_read += len(prefixes)
        self.documents_cut += sum(prefix.cut > 0 for prefix in prefixes)
        self.queries_cut += inputs["pairs"].cut_queries if queries else 0
        if num_items_in_batch is not None:
            # ranks are averaged afterwards
            loss = loss * (queries * self.accelerator.num_processes / num_items_in_batch)
        return (loss, {"likelihood": table}) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """As of `Trainer`; the loss it returns, which is what the trainer reports, is that of all ranks."""
        loss = self._step_within_memory(model, inputs, num_items_in_batch)
        return self.accelerator.reduce(loss, "mean") if self.args.world_size > 1 else loss

    def _step_within_memory(self, model, inputs, num_items_in_batch) -> Tensor:
        """A step of `Trainer`; when the device runs out of memory it is tried again with half of it at a time.

        The gradient is the same: suffixes then are computed twice, in micro-batches, as with ``suffix_micro_batch``.
        Several processes do not try again, since they would wait for each other.
        """
        parameters = [p for p in model.parameters() if p.requires_grad]
        accumulated = [None if p.grad is None else p.grad.clone() for p in parameters]
        counts = self.documents_read, self.documents_cut, self.queries_cut
        tries = count()

        def step() -> Tensor:
            if next(tries):  # the try before may have added a part of the gradient
                for parameter, gradient in zip(parameters, accumulated, strict=True):
                    parameter.grad = None if gradient is None else gradient.clone()
                self.documents_read, self.documents_cut, self.queries_cut = counts
            return super(QPeftTrainer, self).training_step(model, inputs, num_items_in_batch)

        return retry_with_less(step, lambda: self.args.world_size == 1 and self._use_less_memory(len(inputs["pairs"])))

    def _use_less_memory(self, pairs: int) -> bool:
        """Halve micro-batches and passes for good; False if they are of one pair already.

        The config stays as it is, since it is saved with the adapter: another device may have the memory.
        """
        before = min(filter(None, (self._max_pairs_per_batch, self.model.qpeft_config.suffix_micro_batch, pairs)))
        if before == 1:
            return False
        self._max_pairs_per_batch = before // 2
        self._max_tokens_per_batch = max(1, self._max_tokens_per_batch // 2)
        logger.warning(
            "out of memory: retrying the step with suffix_micro_batch=%d and passes of %d tokens",
            self._max_pairs_per_batch,
            self._max_tokens_per_batch,
        )
        return True

    def _likelihood_table(self, model, inputs) -> Tensor:
        """ℓ, the mean log-likelihood per query token, of every query and document, [Q, M] float32."""
        batch, tokens, cache = inputs["pairs"], self._max_tokens_per_batch, self.cache
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
            max_pairs_per_batch=self._max_pairs_per_batch if torch.is_grad_enabled() else None,
        )
        return scores.mean_query_log_likelihood[inputs["pair"]]

    # -- evaluation ----------------------------------------------------------------------------------------------

    @own_state()
    @torch.no_grad()
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Means over the queries of the loss and, where there are negatives, of accuracy and reciprocal rank; and what
        ``compute_metrics`` makes of the scores."""
        training = self.model.training
        self.model.eval()
        self._settle_temperature(self.eval_dataset if self.train_dataset is None else self.train_dataset)
        self.callback_handler.eval_dataloader = dataloader
        loss_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        predictions = (
            None
            if loss_only
            else Predictions(self.accelerator, self.args.eval_batch_size, self.preprocess_logits_for_metrics)
        )
        rows = []
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            table = self._evaluation_table(inputs)
            measures = self._measures(table, inputs)[: inputs["queries"]]
            # of the same size on all ranks; the last column says which rows are real
            padded = torch.nn.functional.pad(measures, (0, 1, 0, self.args.eval_batch_size - len(measures)))
            padded[: len(measures), -1] = 1
            gathered = self.accelerator.gather(padded)
            kept = gathered[:, -1] == 1
            rows.append(gathered[kept, :-1])
            if predictions is not None:
                predictions.add(table, inputs["positive"], inputs["mask"], kept, inputs["queries"])
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        self.model.train(training)
        if not rows:
            raise ValueError(f"QPeftTrainer: there are no examples to evaluate ({description.lower()})")
        measures = torch.cat(rows).double().cpu()
        names = ("loss", "accuracy", "mrr")
        metrics = {
            name: float(column.nanmean())
            for name, column in zip(names, measures.T, strict=True)
            if not column.isnan().all()
        }
        scores, labels = (None, None) if predictions is None else predictions.arrays()
        if predictions is not None and self.compute_metrics is not None:
            metrics |= self._computed_metrics(EvalPrediction(predictions=scores, label_ids=labels), metrics["loss"])
        prefixed = {
            name if name.startswith(f"{metric_key_prefix}_") else f"{metric_key_prefix}_{name}": value
            for name, value in metrics.items()
        }
        return EvalLoopOutput(predictions=scores, label_ids=labels, metrics=prefixed, num_samples=len(measures))

    def _computed_metrics(self, prediction: EvalPrediction, loss: float) -> dict[str, float]:
        """What the user's function makes of the scores; the loss stays ours, as in `Trainer`."""
        computed = self.compute_metrics(prediction)
        if not isinstance(computed, dict):
            raise TypeError(
                f"QPeftTrainer: compute_metrics must return a dict of name and number, got {type(computed).__name__}"
            )
        return denumpify_detensorize(computed) | {"loss": loss}

    def _evaluation_table(self, inputs: dict) -> Tensor:
        """ℓ of every query and document, [Q, M] float32. Raises: ValueError if one is not finite."""
        table = self._likelihood_table(self.model, inputs)
        if not torch.isfinite(table).all():
            raise ValueError(
                "an evaluation score is not finite; train with a lower learning rate, or load the LM in "
                "bfloat16 or float32"
            )
        return table

    def _measures(self, table: Tensor, inputs: dict) -> Tensor:
        """Loss, accuracy and reciprocal rank of every query, [Q, 3]; NaN for the latter two without negatives.

        Ties count against the positive.
        """
        config = self.model.qpeft_config
        positive, mask = inputs["positive"], inputs["mask"]
        losses = [
            configured_loss(config, table[q : q + 1], *(inputs[name][q : q + 1] for name in _LOSS_TABLES))
            for q in range(len(table))
        ]
        negative = mask & ~positive
        best = table.masked_fill(~positive, float("-inf")).amax(1, keepdim=True)
        rank = 1.0 + (negative & (table >= best)).sum(1)
        rank = torch.where(negative.any(1), rank, torch.nan)
        return torch.stack([torch.stack(losses), torch.where(rank.isnan(), rank, (rank == 1).float()), 1 / rank], dim=1)

    # -- training, checkpoints -----------------------------------------------------------------------------------

    @own_state()
    @torch.enable_grad()
    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train; see `Trainer.train`.

        resume_from_checkpoint: a checkpoint folder, or True for the last complete one in ``args.output_dir``: one that
            a kill has cut short is passed over.
        Raises: ValueError if the folder is not a complete checkpoint, or with True if there is none.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_complete()
        elif not resume_from_checkpoint:
            resume_from_checkpoint = None
            if (earlier := last_complete(self.args.output_dir)[0]) is not None:
                logger.warning("%s is of an earlier run: if this one is killed, resuming would find it", earlier)
        elif reason := why_incomplete(resume_from_checkpoint):
            raise ValueError(
                f"cannot resume from {resume_from_checkpoint}: {reason}; pass True to take the last complete checkpoint"
            )
        self._settle_temperature(self.train_dataset, resume_from_checkpoint)
        self.documents_read = self.documents_cut = self.queries_cut = 0
        set_seed(self.args.seed)  # dropout then depends on nothing that was drawn since the trainer was made
        result = super().train(resume_from_checkpoint, **kwargs)
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.model.eval()
        if self.documents_cut:
            logger.warning(
                "%d of the %d documents read in training were cut to max_document_tokens=%d",
                self.documents_cut,
                self.documents_read,
                self.model.qpeft_config.max_document_tokens,
            )
        if self.queries_cut:
            logger.warning(
                "%d queries read in training were cut to max_query_tokens=%d",
                self.queries_cut,
                self.model.qpeft_config.max_query_tokens,
            )
        return result

    @torch.no_grad()
    def _settle_temperature(self, dataset, checkpoint: str | None = None) -> None:
        """Replace "auto" by a number, the same on all ranks: that of the checkpoint, or a fitted one."""
        config = self.model.qpeft_config
        if config.temperature != AUTO or not needs_temperature(config) or dataset is None:
            return
        if checkpoint is not None:
            config.temperature = QPeftConfig.from_pretrained(checkpoint).temperature
            return
        training = self.model.training
        self.model.eval()
        collate, tables = self._collators[True], []
        members = self._first_members(dataset)
        for start in range(0, len(members), config.queries_per_group):
            inputs = self._prepare_inputs(collate(members[start : start + config.queries_per_group]))
            tables.append((self._likelihood_table(self.model, inputs), *(inputs[name] for name in _LOSS_TABLES)))
        config.temperature = best_temperature(config, tables)
        self.model.train(training)
        logger.info("temperature of the loss: %g, fitted on %d queries", config.temperature, len(members))

    def _first_members(self, dataset) -> list:
        """The queries, with their documents, that training begins with."""
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()))
        config, seed = self.model.qpeft_config, self._data_seed
        if not _is_sized(dataset):
            stream = StreamedTrainingExamples(dataset, config.num_hard_negatives, seed)
            return list(islice(stream, _QUERIES_FOR_TEMPERATURE))
        examples = TrainingExamples(dataset, config.num_hard_negatives, seed, config.num_random_negatives)
        order = EpochOrder(len(dataset), seed, self.args.train_sampling_strategy == "random")
        return [examples[key] for key in islice(order, _QUERIES_FOR_TEMPERATURE)]

    def _last_complete(self) -> str:
        folder, skipped = last_complete(self.args.output_dir)
        for path, reason in skipped.items():
            logger.warning("%s is passed over: %s", path, reason)
        if folder is None:
            raise ValueError(
                f"resume_from_checkpoint=True: there is no complete checkpoint in {self.args.output_dir}; "
                f"name its folder, or leave it out to train from the beginning"
            )
        return str(folder)

    def _save_checkpoint(self, model, trial) -> None:
        """Write, then mark as complete, then delete older ones: at any moment one can be resumed from."""
        run_dir = Path(self._get_output_dir(trial))
        folder = run_dir / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.exists():
            shutil.rmtree(folder)  # cut short by a kill, or of an earlier run: none of its files may survive
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        except RuntimeError as error:
            if not re.search("iostream|inline_container|PytorchStreamWriter|unexpected pos", str(error)):
                raise
            raise OSError(
                f"cannot write the checkpoint {folder} (File too large, or no space left); make room for it"
            ) from None
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(folder)
            best = self.state.best_model_checkpoint
            rotate(run_dir, limit, {folder, Path(best)} if best else {folder})

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The adapter's own files (`QPeftModel.save_pretrained`); the trainer adds its state, nothing pickled."""
        if self.args.should_save:
            self.model.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        then, now = (
            config.to_dict()
            for config in (QPeftConfig.from_pretrained(resume_from_checkpoint), self.model.qpeft_config)
        )
        changed = [
            f"{name} {then[name]!r} -> {now[name]!r}"
            for name in now
            if then[name] != now[name] and not name.startswith("base_model")
        ]
        if changed:
            logger.warning("the run is resumed with other options: %s", ", ".join(changed))
        load_weights_into(self.model, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _state_of(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _state_of(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        logger.info("loading the best adapter, %s (%s)", self.state.best_model_checkpoint, self.state.best_metric)
        load_weights_into(self.model, self.state.best_model_checkpoint)

    def _build_accelerator_args(self, **kwargs) -> dict:
        """Loss scaling of fp16 without its autocast: LM and clue module keep their dtypes."""
        from accelerate.utils import AutocastKwargs

        arguments = super()._build_accelerator_args(**kwargs)
        arguments["kwargs_handlers"] = [*arguments.get("kwargs_handlers", ()), AutocastKwargs(enabled=False)]
        return arguments


@contextmanager
def _state_of(checkpoint: str | None) -> Iterator[None]:
    """What torch raises for a state that is damaged, or that holds more than tensors and numbers, becomes one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise ValueError(
            f"{checkpoint}: the state of the training cannot be read ({reason}); remove the folder to "
            "resume from an earlier one"
        ) from None


class _EpochOfOrder(TrainerCallback):
    """Tells the order of examples which epoch begins: in a resumed run on many ranks accelerate does not reach it."""

    def __init__(self, trainer: QPeftTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs) -> None:
        if _is_sized(self.trainer.train_dataset):
            steps = -(-len(train_dataloader) // args.gradient_accumulation_steps)
            self.trainer.order.set_epoch(state.global_step // steps)


def _is_sized(dataset) -> bool:
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")


def _check_index(index: PrefixIndex, model: QPeftModel) -> None:
    """Raises: ValueError if training cannot read its prefixes."""
    why = model.engine.why_plain
    if not why and model.engine.prefix_is_trained:
        why = "its soft prompt, or what is trained in its LM, changes the prefixes with every step"
    if why:
        raise ValueError(f"QPeftTrainer: an index is of no use to this model: {why}")
    index.expect_prompt(model.prompt)


def _check_dataset(dataset, what: str, config: QPeftConfig | None = None) -> None:
    """Look at every example of a list now; those of other datasets are looked at when they are read.

    config: where they are to be trained on: whether they have the negatives that its loss needs.
    """
    if dataset is None:
        return
    if not _is_sized(dataset):
        if not hasattr(dataset, "__iter__") or hasattr(dataset, "__next__"):
            raise ValueError(
                f"QPeftTrainer: {what}s must be a list, a datasets.Dataset or an iterable that can be "
                f"read again, got a {type(dataset).__name__}"
            )
        return
    if not len(dataset):
        raise ValueError(f"QPeftTrainer: there are no {what}s")
    if isinstance(dataset, (list, tuple)):
        examples = view(dataset, what)
        for index, example in enumerate(examples):
            check_example(example, index, what)
        if config is not None:
            if lacking := lacking_negatives(examples, config):
                logger.warning("%s", lacking)
