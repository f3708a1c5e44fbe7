"""What `QPeftTrainer` takes of `Trainer`: metrics of the user, and a line for what it does not take."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import transformers
from training.tiny_training import EACH_STEP, EXAMPLES, tiny_model, trainer, weights

import qpeft_ext as qpeft
from qpeft_ext.prompts.pairs import PairBatch

pytestmark = pytest.mark.slow


# 1 + 3, 1 + 1, 2 + 2 documents; the third brings one of its positives again as a negative
UNEVEN = [
    EXAMPLES[0],
    {**EXAMPLES[1], "negatives": EXAMPLES[1]["negatives"][:1]},
    {
        **EXAMPLES[2],
        "positives": [*EXAMPLES[2]["positives"], "a second answer"],
        "negatives": ["A second  answer", *EXAMPLES[2]["negatives"][:2]],
    },
]
LABELS = [[1, 0, 0, 0], [1, 0, -100, -100], [1, 1, 0, 0]]


def with_metrics(folder, compute_metrics=None, dev=UNEVEN, **options):
    settings = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2,
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 1e-2,
    } | options.pop("args", {})
    args = transformers.TrainingArguments(str(folder), **settings)
    return qpeft.QPeftTrainer(tiny_model(), args, EXAMPLES, dev, compute_metrics=compute_metrics, **options)


def expected_scores(model):
    """ℓ of every pair, each scored on its own."""
    rows = []
    for example, labels in zip(UNEVEN, LABELS, strict=True):
        documents = [*example["positives"], *example["negatives"]]
        documents = [d for d in documents if d != "A second  answer"]
        with torch.no_grad():
            scores = [
                float(
                    model(PairBatch.from_text(model.prompt, [(example["query"], document)])).mean_query_log_likelihood
                )
                for document in documents
            ]
        rows.append(scores + [-np.inf] * (len(labels) - len(scores)))
    return np.array(rows)


def test_compute_metrics_gets_scores_and_labels(tmp_path):
    seen = []

    def mean_rank(prediction):
        seen.append(prediction)
        scores, labels = prediction
        best = np.where(labels == 1, scores, -np.inf).max(1)
        return {"rank": (scores > best[:, None]).sum(1).mean() + 1, "eval_queries": len(scores), "loss": 99.0}

    run = with_metrics(tmp_path, mean_rank)
    metrics = run.evaluate()
    (prediction,) = seen
    assert prediction.label_ids.tolist() == LABELS and prediction.predictions.dtype == np.float32
    scores = expected_scores(run.model)
    np.testing.assert_allclose(prediction.predictions, scores, atol=1e-5)
    ranks = 1 + (scores > np.where(np.array(LABELS) == 1, scores, -np.inf).max(1)[:, None]).sum(1)
    assert metrics["eval_rank"] == pytest.approx(ranks.mean()) and metrics["eval_queries"] == 3
    assert metrics["eval_loss"] == with_metrics(tmp_path).evaluate()["eval_loss"] != 99.0
    assert metrics["eval_mrr"] == pytest.approx((1 / ranks).mean())
    named = run.evaluate({"a": UNEVEN, "b": UNEVEN[:1]})
    assert named["eval_a_rank"] == metrics["eval_rank"] and named["eval_b_rank"] == ranks[0]


@pytest.mark.parametrize("batch_size", [1, 2])  # tables of several widths, and of one
def test_predict_gives_the_same_two(tmp_path, batch_size):
    run = with_metrics(tmp_path, args={"per_device_eval_batch_size": batch_size})
    done = run.predict(UNEVEN)
    assert done.label_ids.tolist() == LABELS and done.metrics["test_loss"] == run.evaluate()["eval_loss"]
    np.testing.assert_allclose(done.predictions, expected_scores(run.model), atol=1e-5)


def test_the_best_checkpoint_by_a_metric_of_the_user(tmp_path):
    values = iter([0.1, 0.9, 0.5, 0.9])
    run = with_metrics(
        tmp_path,
        lambda prediction: {"hits": next(values)},
        args={"max_steps": 3, "metric_for_best_model": "hits", **EACH_STEP, "save_strategy": "steps"},
    )
    run.train()
    assert run.state.best_metric == 0.9 and run.state.best_model_checkpoint.endswith("checkpoint-2")


def test_scores_may_be_replaced_before_they_are_kept(tmp_path):
    run = with_metrics(tmp_path, preprocess_logits_for_metrics=lambda scores, labels: scores.argmax(1))
    wanted = expected_scores(run.model)
    assert run.predict(UNEVEN).predictions.tolist() == wanted.argmax(1).tolist()
    run = with_metrics(tmp_path, preprocess_logits_for_metrics=lambda _, labels: labels[:, :, None].repeat(1, 1, 2))
    assert run.predict(UNEVEN).predictions[:, :, 1].tolist() == LABELS
    for wrong, got in ((lambda *tables: tables, "tuple"), (lambda scores, labels: scores[:1], r"\[1, ")):
        run = with_metrics(tmp_path, preprocess_logits_for_metrics=wrong)
        with pytest.raises(TypeError, match=f"a tensor with a row for each of the 2 queries, got {got}"):
            run.predict(UNEVEN)


def test_metrics_that_are_no_dict_or_no_function(tmp_path):
    with pytest.raises(TypeError, match="compute_metrics must return a dict of name and number, got float"):
        with_metrics(tmp_path, lambda prediction: 0.5).evaluate()
    with pytest.raises(TypeError, match="compute_metrics must be a function, got dict"):
        with_metrics(tmp_path, {"ndcg": 1})


@pytest.mark.parametrize(
    "argument, message",
    [
        ({"data_collator": None}, "does not take data_collator: queries are put into groups by the trainer itself"),
        ({"processing_class": None}, "does not take processing_class: the model has its tokenizer"),
        ({"model_init": None}, "does not take model_init: give a model"),
        ({"compute_loss_func": None}, "does not take compute_loss_func: the loss is that of QPeftConfig"),
        (
            {"train_datset": []},
            "does not take train_datset; it takes model, args, train_dataset, eval_dataset, callbacks",
        ),
    ],
)
def test_arguments_that_are_not_taken(tmp_path, argument, message):
    with pytest.raises(TypeError, match=message) as caught:
        with_metrics(tmp_path, **argument)
    assert len(str(caught.value)) < 300


def test_a_search_for_arguments_says_what_to_do_instead(tmp_path):
    with pytest.raises(NotImplementedError, match="make a model and a trainer for each trial, around the same LM"):
        with_metrics(tmp_path).hyperparameter_search(n_trials=2, backend="optuna")


def test_a_model_that_is_none(tmp_path):
    with pytest.raises(TypeError, match="model must be a QPeftModel, as get_qpeft_model.* makes it, got Linear"):
        qpeft.QPeftTrainer(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"batch_eval_metrics": True}, "compute_metrics is called once"),
        ({"include_for_metrics": ["inputs"]}, "compute_metrics gets the scores"),
        ({"include_num_input_tokens_seen": "all"}, "documents_read counts"),
        ({"eval_do_concat_batches": False}, "one table of all queries"),
        (
            {"lr_scheduler_type": "constant", "warmup_steps": 5},
            "warmup_steps=5 does nothing with lr_scheduler_type='con",
        ),
        ({"torch_compile": True}, "shapes change"),
        ({"neftune_noise_alpha": 5.0}, "the LM is frozen"),
    ],
)
def test_settings_that_would_do_nothing(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **settings)


def test_settings_without_effect_are_said_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "qpeft_ext.training.arguments"):
        trainer(tmp_path, label_names=["x"], average_tokens_across_devices=False, eval_accumulation_steps=2)
        trainer(tmp_path, label_names=None, remove_unused_columns=False)
    (line,) = (record.message for record in caplog.records)
    assert "without effect here: label_names=['x'] (labels are" in line
    assert "average_tokens_across_devices=False" in line and "eval_accumulation_steps=2" in line


def test_a_cache_without_use_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "qpeft_ext.training.arguments"):
        trainer(tmp_path, cache_bytes=1 << 20)
        trainer(tmp_path, tiny_model(num_virtual_tokens=2), dev=EXAMPLES, cache_bytes=1 << 20)
        assert not caplog.records
        trainer(tmp_path, tiny_model(layout="clues_first"), cache_bytes=1 << 20)
        trainer(tmp_path, tiny_model(num_virtual_tokens=2), cache_bytes=1 << 20)
    first, second = (record.message for record in caplog.records)
    assert first.startswith("QPeftTrainer: a cache is of no use to this model: layout='clues_first' puts the clues")
    assert "no use to this model: its soft prompt, or what is trained in its LM, changes the prefixes" in second


def test_calls_that_have_nothing_to_read(tmp_path):
    with pytest.raises(ValueError, match="predict takes one set of examples, got a dict of a, b; call it for each"):
        trainer(tmp_path).predict({"a": EXAMPLES, "b": EXAMPLES})
    run = trainer(tmp_path, examples=EXAMPLES[:2], dataloader_drop_last=True, max_steps=-1)
    with pytest.raises(ValueError, match="drop_last=True leaves out all training examples .2., since a batch has 4"):
        run.train()


def test_an_optimizer_by_its_class(tmp_path):
    run = with_metrics(tmp_path, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}), args={"max_steps": 1})
    before = weights(run.model)
    run.train()
    assert any(not torch.equal(before[name], value) for name, value in weights(run.model).items())
    assert type(run.optimizer.optimizer if hasattr(run.optimizer, "optimizer") else run.optimizer) is torch.optim.SGD
