"""Evaluation in training: the rank of positives among all negatives."""

from __future__ import annotations

import pytest
import torch
from training.tiny_training import EXAMPLES, tiny_model, trainer

import qpeft_ext as qpeft

pytestmark = pytest.mark.slow


def test_evaluation_ranks_positives_among_all_negatives(tmp_path):
    dev = [dict(example, positives=[*example["positives"], "a second answer"]) for example in EXAMPLES[:5]]
    model = tiny_model(dropout=0.5)
    metrics = trainer(tmp_path, model, dev=dev, per_device_eval_batch_size=2).evaluate()
    reranker, ranks = qpeft.Reranker(model), []
    for example in dev:
        documents = [*example["positives"], *example["negatives"]]
        order = [row["corpus_id"] for row in reranker.rank(example["query"], documents)]
        ranks.append(1 + min(order.index(0), order.index(1)))
    # the rank of the best positive among the negatives; no positive stands before it
    assert metrics["eval_accuracy"] == pytest.approx(sum(rank == 1 for rank in ranks) / 5)
    assert metrics["eval_mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / 5)
    assert 0 < metrics["eval_mrr"] < 1


def test_without_negatives_there_is_a_loss_only(tmp_path):
    metrics = trainer(tmp_path, dev=[dict(EXAMPLES[0], negatives=[])]).evaluate()
    assert "eval_loss" in metrics and "eval_mrr" not in metrics


def test_ties_count_against_the_positive(tmp_path):
    run = trainer(tmp_path, tiny_model())
    with torch.no_grad():
        run._likelihood_table = lambda model, inputs: torch.zeros(inputs["pair"].shape)
        metrics = run.evaluate(EXAMPLES[:2])
    assert metrics["eval_accuracy"] == 0 and metrics["eval_mrr"] == pytest.approx(1 / 4)
