"""QPeftTrainer: what a query meets, the loss and its normalisation, evaluation, checkpoints, kills."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from families.tiny import tiny_lm, tiny_tokenizer
from training.tiny_training import EACH_STEP, EXAMPLES, Stream, tiny_model, trainer, weights

import qpeft_ext as qpeft
from qpeft_ext.lm.passes import without_cudnn_attention
from qpeft_ext.prompts.prompt import Prompt
from qpeft_ext.training.checkpoints import MANIFEST, last_complete, mark_complete, rotate, why_incomplete
from qpeft_ext.training.collator import GroupCollator
from qpeft_ext.training.examples import drawn_member
from qpeft_ext.training.sampling import EpochOrder, StreamedTrainingExamples, TrainingExamples


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()


def assert_close(first: dict, second: dict, tolerance: float) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=tolerance)


# -- what a query meets ------------------------------------------------------------------------------------------


def collate(examples, queries_per_group=4, in_batch=True, num_hard_negatives=1, epoch=0):
    members = [drawn_member(example, i, epoch, num_hard_negatives, seed=0) for i, example in enumerate(examples)]
    return GroupCollator(Prompt(tiny_tokenizer(), qpeft.QPeftConfig()), queries_per_group, in_batch)(members)


def test_a_group_is_scored_on_its_distinct_pairs():
    batch = collate(EXAMPLES[:4])
    assert len(batch["pairs"]) <= 32 and len(batch["pairs"].queries) == 4
    assert batch["positive"].sum(1).tolist() == [1] * 4
    # the columns of a query are the group's documents, each once
    for pair, mask in zip(batch["pair"], batch["mask"], strict=True):
        documents = [batch["pairs"].pairs[i][1] for i in pair[mask]]
        assert len(set(documents)) == len(documents) == int(mask.sum())
    alone = collate(EXAMPLES[:4], in_batch=False)
    assert alone["mask"].sum(1).tolist() == [2] * 4


def test_a_querys_candidates_are_its_own_documents():
    """What ``source="candidates"`` draws its clues from in training: not the documents of the group's other queries."""
    batch = collate(EXAMPLES[:4])["pairs"]
    assert [len(candidates) for candidates in batch.candidates] == [2] * 4
    for query, candidates in enumerate(batch.candidates):
        texts = [tiny_tokenizer().decode(batch.documents[d].document_ids).strip() for d in candidates]
        assert texts[0] == EXAMPLES[query]["positives"][0]["text"]
        assert texts[1] in [document["text"] for document in EXAMPLES[query]["negatives"]]
        assert sum(q == query for q, _ in batch.pairs) > 2  # the others are scored as well


def test_groups_share_nothing_but_the_computation():
    batch = collate(EXAMPLES[:8])
    assert batch["mask"].sum(1).max() <= 8 and len(batch["pairs"].documents) <= 16


@pytest.mark.parametrize(
    "other",
    [
        {"id": "p0", "text": "the same document by its id, in another edition"},
        {"text": "  TIDES by the   sea, tides"},
        "Tides by the sea, tides",
    ],
)
def test_a_relevant_document_is_never_a_negative(other):
    shared = dict(EXAMPLES[1], positives=[other], negatives=[])
    batch = collate([dict(EXAMPLES[0], negatives=[other]), shared])
    # neither as the first query's own negative nor as the second one's document; for the second one, which has
    # another text or no id, the first one's positive may be a negative
    assert int(batch["mask"][0].sum()) == 1


def test_a_query_that_occurs_twice_has_the_positives_of_both():
    twice = dict(EXAMPLES[0], query="ABOUT  tides?", query_id=None, positives=["another answer"], negatives=[])
    batch = collate([dict(EXAMPLES[0], negatives=[]), twice])
    assert batch["mask"].sum(1).tolist() == [1, 1]


def test_draws_depend_on_seed_epoch_and_example_alone():
    example = dict(EXAMPLES[0], negatives=[f"negative {i}" for i in range(50)])

    def drawn(epoch, seed=0, index=0):
        return [d.document for d in drawn_member(example, index, epoch, 3, seed).negatives]

    assert drawn(0) == drawn(0) and len(set(drawn(0))) == 3
    assert len({str(d) for d in (drawn(0), drawn(1), drawn(0, seed=1), drawn(0, index=1))}) == 4
    order = EpochOrder(50, seed=0)
    first = list(order)
    order.set_epoch(1)
    assert list(order) != first and sorted(i for _, i in first) == list(range(50)) and list(order)[0][0] == 1


def test_random_negatives_are_drawn_from_other_examples():
    examples = TrainingExamples(EXAMPLES, 1, 0, num_random_negatives=3)

    def drawn(index, epoch=0, of=examples):
        return [d.id for d in of[epoch, index].negatives]

    assert drawn(0) == drawn(0) and drawn(0) != drawn(0, epoch=1)
    for index in range(12):
        ids = drawn(index)
        assert len(ids) == 4 == len(set(ids)) and f"p{index}" not in ids
    assert len({id for index in range(12) for epoch in range(9) for id in drawn(index, epoch)}) == 48  # all there are
    few = TrainingExamples(EXAMPLES[:1], 3, 0, num_random_negatives=3)  # nothing left to draw
    assert len(drawn(0, of=few)) == 3
    with pytest.raises(ValueError, match="num_random_negatives=3 needs examples in a list"):
        StreamedTrainingExamples(EXAMPLES, 1, 0, num_random_negatives=3)


@pytest.mark.parametrize("again", [{"query_id": "q0", "query": "other words"}, {"query": " ABOUT  tides?"}])
def test_positives_of_the_same_query_in_another_example_are_no_negatives(again):
    """One example per (query, positive): the other positive may be named as a negative, or be drawn at random."""
    other = again | {"positives": [{"id": "n0-0", "text": "also relevant"}], "negatives": []}
    first = dict(EXAMPLES[0], query_id="q0" if "query_id" in again else None)
    known = TrainingExamples([first, *EXAMPLES[1:], other], 3, 0, num_random_negatives=30)
    ids = {d.id for epoch in range(5) for d in known[epoch, 0].negatives}
    assert "n0-0" not in ids and {"n0-1", "n0-2", "p5"} <= ids
    assert "p0" not in {d.id for epoch in range(5) for d in known[epoch, 12].negatives}
    alone = TrainingExamples([first, *EXAMPLES[1:]], 3, 0)
    assert "n0-0" in {d.id for d in alone[0, 0].negatives}


def test_teacher_scores_stay_with_their_documents(tmp_path):
    examples = [
        dict(example, positive_scores=[10 + i], negative_scores=[i, i + 0.25, i + 0.5])
        for i, example in enumerate(EXAMPLES)
    ]
    batch = collate(examples[:4], in_batch=False, num_hard_negatives=2)
    for q in range(4):
        ids = [batch["pairs"].pairs[i][1] for i in batch["pair"][q]]
        texts = [tiny_tokenizer().decode(batch["pairs"].documents[d].document_ids).strip() for d in ids]
        given = [d["text"] for d in examples[q]["negatives"]]
        expected = [10 + q] + [examples[q]["negative_scores"][given.index(text)] for text in texts[1:]]
        assert batch["teacher_scores"][q].tolist() == expected
    model = tiny_model(loss="margin_mse", in_batch_negatives=False)
    run = trainer(tmp_path, model, examples[:4], examples[:4], max_steps=30, learning_rate=2e-2)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < 0.7 * before
    with pytest.raises(ValueError, match="example [0-3]: loss='margin_mse' needs a teacher score for each document"):
        trainer(tmp_path, tiny_model(loss="margin_mse", in_batch_negatives=False), EXAMPLES[:4]).train()


def test_streams_go_on_without_end():
    stream = iter(StreamedTrainingExamples(EXAMPLES[:3], 1, seed=0))
    members = [next(stream) for _ in range(7)]
    assert [m.index for m in members] == [0, 1, 2, 0, 1, 2, 0]
    with pytest.raises(ValueError, match="no training examples"):
        next(iter(StreamedTrainingExamples([], 1, seed=0)))


GOOD = EXAMPLES[0]
BAD = [
    ("a text", "expected a dict with query, positives and negatives, got str"),
    ({"query": "x", "negatives": ["y"]}, "expected a query and its documents: .* got the keys query, negatives"),
    (dict(GOOD, query="  "), "query must be a text that is not empty"),
    (dict(GOOD, query=3), "query must be a text"),
    (dict(GOOD, positives=[]), "positives is empty"),
    (dict(GOOD, positives="one document"), "positives must be a list of documents, got str"),
    (dict(GOOD, negatives=[{"title": "no text"}]), "negatives: a document must be"),
    (dict(GOOD, positives=[" "]), "a positive document has no text"),
    (dict(GOOD, negative_scores=[1.0]), r"negative_scores must be a finite number for each of the 3 neg.* got \[1.0"),
    (dict(GOOD, positive_scores=[float("nan")]), r"positive_scores must be a finite number .* got \[nan\]"),
]


@pytest.mark.parametrize("example, message", BAD)
def test_bad_examples_are_named(tmp_path, example, message):
    with pytest.raises(ValueError, match=f"^training example 2.*{message}"):
        trainer(tmp_path, examples=[GOOD, GOOD, example])
    with pytest.raises(ValueError, match=f"^evaluation example 1.*{message}"):
        trainer(tmp_path, dev=[GOOD, example])


def test_a_query_too_long_is_named(tmp_path):
    examples = [dict(GOOD, query="long " * 50)] * 4
    with pytest.raises(ValueError, match="example [0-3]: query .* has 2.. tokens, max_query_tokens is 64"):
        trainer(tmp_path, examples=examples).train()


def test_queries_too_long_are_cut_on_request_and_counted(tmp_path, caplog):
    long, cut = "long " * 50, (" " + "long " * 50)[1:64]  # a byte is a token, and a space goes before a query
    parameters = []
    for query in (long, cut):
        args = transformers.TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=4, save_strategy="no", use_cpu=True
        )
        ours = qpeft.QPeftTrainer(tiny_model(), args, [dict(GOOD, query=query)] * 4, truncate_queries=True)
        ours.train()
        parameters.append(weights(ours.model))
        assert ours.queries_cut == (query is long)  # the same query four times is read once
    assert_close(*parameters, 0)
    assert "1 queries read in training were cut to max_query_tokens=64" in caplog.text


# -- arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"per_device_train_batch_size": 6}, "multiple of queries_per_group, 4, got 6"),
        ({"activation_checkpointing": True}, "suffix_micro_batch"),
        ({"gradient_checkpointing": True}, "suffix_micro_batch"),
        ({"train_sampling_strategy": "group_by_length"}, "random or sequential"),
        ({"bf16": True}, "the LM is in float32; .*load it with"),
        ({"label_smoothing_factor": 0.1}, "no labels"),
        ({"auto_find_batch_size": True}, "suffix_micro_batch"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **settings)


def test_nothing_to_train(tmp_path):
    with pytest.raises(ValueError, match="nothing to train"):
        trainer(tmp_path, tiny_model(clues="none"))
    for examples in ([], (example for example in EXAMPLES)):
        with pytest.raises(ValueError, match="no training examples|can be read again"):
            trainer(tmp_path, examples=examples)


def test_the_users_arguments_stay_as_they_are(tmp_path):
    args = transformers.TrainingArguments(str(tmp_path), per_device_train_batch_size=4, use_cpu=True, bf16=True)
    qpeft.QPeftTrainer(tiny_model(tiny_lm("llama", dtype=torch.bfloat16)), args, EXAMPLES)
    assert args.bf16 and args.accelerator_config.dispatch_batches is None


# -- the loss ----------------------------------------------------------------------------------------------------


def one_step(folder, examples, model=None, **args):
    done = trainer(
        folder,
        model,
        examples,
        max_steps=1,
        optim="sgd",
        learning_rate=0.5,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        **args,
    )
    loss = done.train().training_loss
    return weights(done.model), loss


def test_accumulation_equals_the_larger_batch(tmp_path):
    start = weights(tiny_model())
    whole, loss = one_step(tmp_path, EXAMPLES[:8], per_device_train_batch_size=8)
    split, split_loss = one_step(tmp_path, EXAMPLES[:8], gradient_accumulation_steps=2)
    assert loss == pytest.approx(split_loss, abs=1e-5)
    assert_close(whole, split, 1e-6)
    assert max(float((whole[name] - start[name]).abs().max()) for name in start) > 1e-3
    # batches of 8 and 2 queries, in groups of 4, 4 and 2: every query counts the same
    whole, loss = one_step(tmp_path, EXAMPLES[:10], per_device_train_batch_size=12)
    split, split_loss = one_step(tmp_path, EXAMPLES[:10], per_device_train_batch_size=8, gradient_accumulation_steps=2)
    assert loss == pytest.approx(split_loss, abs=1e-5)
    assert_close(whole, split, 1e-6)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "options", [{}, {"clues": "top_k"}, {"num_virtual_tokens": 3}, {"generated_lora_rank": 2}], ids=str
)
def test_a_step_and_scores_on_cuda_equal_those_on_the_cpu(tmp_path, options):
    results = []
    for device in ("cpu", "cuda"):
        model = tiny_model(tiny_lm("llama").to(device), **options)
        stepped, loss = one_step(tmp_path, EXAMPLES[:4], model, use_cpu=device == "cpu")
        scores = qpeft.Reranker(model).predict([("boats", "a boat on the sea"), ("moon", "dull words " * 9)])
        results.append(({name: x.cpu() for name, x in stepped.items()}, loss, torch.as_tensor(scores)))
    (expected, loss, scores), (ours, our_loss, our_scores) = results
    assert our_loss == pytest.approx(loss, abs=1e-4)
    assert_close(ours, expected, 1e-4)
    torch.testing.assert_close(our_scores, scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("options", [{}, {"suffix_micro_batch": 3}, {"num_virtual_tokens": 3}], ids=str)
def test_no_pass_takes_attention_of_cudnn(tmp_path, family, options):
    """Its backward returned NaN on an H100; layers that are run again in the backward pass are passes too."""
    lm, seen = tiny_lm(family), []
    lm.get_decoder().register_forward_pre_hook(lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    (lm.get_encoder() if family == "t5" else lm).register_forward_pre_hook(
        lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled())
    )
    model = tiny_model(lm, **options)
    seen.clear()  # making an engine tries the LM on a few tokens
    one_step(tmp_path, EXAMPLES[:4], model)
    qpeft.Reranker(model).rank("a query", ["one", "two documents"])
    assert len(seen) >= 4 and not any(seen)
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_the_setting_of_cudnn_comes_back_after_passes_of_two_threads():
    setting, first, second = torch.backends.cuda, without_cudnn_attention(), without_cudnn_attention()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not setting.cudnn_sdp_enabled()  # the second is still inside
    second.__exit__(None, None, None)
    assert setting.cudnn_sdp_enabled()


def test_micro_batches_and_deterministic_give_the_same_step(tmp_path):
    expected, _ = one_step(tmp_path, EXAMPLES[:4])
    assert_close(one_step(tmp_path, EXAMPLES[:4], tiny_model(suffix_micro_batch=3))[0], expected, 1e-5)
    assert_close(one_step(tmp_path, EXAMPLES[:4], deterministic=True)[0], expected, 1e-5)
    assert_close(one_step(tmp_path, EXAMPLES[:4], cache_bytes=1 << 20)[0], expected, 1e-5)


@pytest.mark.parametrize("where", ["in the prefix pass", "in the backward pass"])
def test_a_step_that_does_not_fit_is_taken_in_parts(tmp_path, monkeypatch, caplog, where):
    def weights_after(folder, model):
        trained = trainer(folder, model, gradient_accumulation_steps=2, optim="sgd")
        trained.train()
        return weights(model), trained

    expected, whole = weights_after(tmp_path / "whole", tiny_model())
    model, failures = tiny_model(), []
    if where == "in the prefix pass":
        prefill = model.engine.prefill

        def failing(prefixes):
            if sum(map(len, prefixes)) > 150:
                failures.append(len(prefixes))
                raise torch.OutOfMemoryError("pretended")
            return prefill(prefixes)

        monkeypatch.setattr(model.engine, "prefill", failing)
    else:
        backward = torch.Tensor.backward

        def failing(loss, *args, **kwargs):
            backward(loss, *args, **kwargs)
            if len(failures) < 3 and len(failures) != 1:  # the first try, and one with a gradient from before
                failures.append(loss)
                raise torch.OutOfMemoryError("pretended")
            failures.append(None)

        monkeypatch.setattr(torch.Tensor, "backward", failing)
    found, trained = weights_after(tmp_path / "parts", model)
    assert failures and "out of memory: retrying the step with suffix_micro_batch=" in caplog.text
    assert_close(found, expected, 1e-5)
    assert trained.documents_read == whole.documents_read  # not counted twice
    monkeypatch.setattr(model.engine, "prefill", lambda p: (_ for _ in ()).throw(torch.OutOfMemoryError("always")))
    with pytest.raises(torch.OutOfMemoryError):
        trained.train()
    assert trained._budget.max_pairs == 1
    model.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert model.qpeft_config.suffix_micro_batch is None and saved["suffix_micro_batch"] is None


@pytest.mark.parametrize("clues", ["attention", "top_k"])
@pytest.mark.parametrize("loss", ["pointwise_pairwise", "listwise", "contrastive"])
def test_the_loss_falls_on_a_fixed_set(tmp_path, clues, loss):
    model = tiny_model(clues=clues, loss=loss)
    fit = trainer(tmp_path, model, EXAMPLES[:4], EXAMPLES[:4], max_steps=40, learning_rate=2e-2, cache_bytes=1 << 20)
    before = fit.evaluate()["eval_loss"]
    fit.train()
    assert fit.evaluate()["eval_loss"] < before - 0.2
    assert fit.cache.hits > fit.cache.misses  # the second epoch reads the first one's prefixes


def test_the_schedule_follows_the_true_steps(tmp_path):
    # 12 examples, 4 a batch: 3 batches, an optimiser step of 2 and one of 1
    run = trainer(
        tmp_path, num_train_epochs=2, max_steps=-1, gradient_accumulation_steps=2, logging_steps=1, learning_rate=1.0
    )
    run.train()
    rates = [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]
    assert run.state.global_step == 4 and rates == pytest.approx([1, 0.75, 0.5, 0.25])
    assert run.lr_scheduler.get_last_lr()[0] == pytest.approx(0)


def test_two_runs_are_bit_equal_and_seeds_matter(tmp_path):
    first, second, other = (trainer(tmp_path, tiny_model(dropout=0.1), seed=seed) for seed in (3, 3, 4))
    for run in (first, second, other):
        torch.rand(1)  # what was drawn before does not matter
        run.train()
    assert_close(weights(first.model), weights(second.model), 0)
    assert any(not torch.equal(w, weights(other.model)[name]) for name, w in weights(first.model).items())


def test_a_bfloat16_lm_trains_float32_clues(tmp_path):
    model = tiny_model(tiny_lm("llama", dtype=torch.bfloat16))
    before = weights(model)
    run = trainer(tmp_path, model, bf16=True, logging_steps=1)
    run.train()
    after = weights(model)
    assert all(w.dtype == torch.float32 and torch.isfinite(w).all() for w in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in after)
    assert model.engine.table.dtype == torch.bfloat16


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    model = tiny_model()
    model.clues.mlp.down.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="the loss of step 1 is not finite"):
        trainer(tmp_path, model).train()


def test_iterables_train_and_resume_over_their_end(tmp_path):
    settings = {
        "examples": Stream(),
        "dev": Stream(),
        "max_steps": 5,
        "save_strategy": "steps",
        "save_steps": 4,
        "deterministic": True,
    }
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    assert "eval_mrr" in whole.evaluate()
    resumed = trainer(tmp_path / "whole", **settings)
    resumed.train(str(tmp_path / "whole" / "checkpoint-4"))
    assert_close(weights(resumed.model), weights(whole.model), 0)
    with pytest.raises(ValueError, match="dataloader_num_workers=0"):
        trainer(tmp_path, dataloader_num_workers=1, **settings)


def test_a_datasets_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    expected, given = (trainer(tmp_path, examples=e) for e in (EXAMPLES, datasets.Dataset.from_list(EXAMPLES)))
    expected.train(), given.train()
    assert_close(weights(given.model), weights(expected.model), 0)


# -- evaluation --------------------------------------------------------------------------------------------------


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
    metrics = trainer(tmp_path, dev=[dict(GOOD, negatives=[])]).evaluate()
    assert "eval_loss" in metrics and "eval_mrr" not in metrics


def test_ties_count_against_the_positive(tmp_path):
    run = trainer(tmp_path, tiny_model())
    with torch.no_grad():
        run._likelihood_table = lambda model, inputs: torch.zeros(inputs["pair"].shape)
        metrics = run.evaluate(EXAMPLES[:2])
    assert metrics["eval_accuracy"] == 0 and metrics["eval_mrr"] == pytest.approx(1 / 4)


# -- checkpoints -------------------------------------------------------------------------------------------------


def scripted(run, losses):
    """A trainer whose evaluation loss is ``losses[step]``."""
    run._measures = lambda table, _: torch.tensor([[losses[run.state.global_step], 1, 1]]).repeat(len(table), 1)
    return run


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    run = trainer(tmp_path, dev=EXAMPLES, max_steps=4, save_total_limit=2, **EACH_STEP)
    scripted(run, {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.0}).train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    best, last = (
        qpeft.QPeftModel.from_pretrained(tmp_path / name, tiny_lm("llama"), tiny_tokenizer())
        for name in ("checkpoint-2", "checkpoint-4")
    )
    ours = dict(run.model.clues.named_parameters())
    assert_close(dict(best.clues.named_parameters()), ours, 0)
    assert any(not torch.equal(w, ours[name]) for name, w in last.clues.named_parameters())


def test_patience_survives_a_restart(tmp_path):
    losses = {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 5.0}

    def run(resume):
        early = transformers.EarlyStoppingCallback(early_stopping_patience=2)
        one = trainer(tmp_path, dev=EXAMPLES, callbacks=[early], max_steps=5, **EACH_STEP)
        scripted(one, losses).train(resume)
        return one.state.global_step

    assert run(None) == 3
    assert run(str(tmp_path / "checkpoint-2")) == 3


def test_checkpoints_hold_no_pickled_objects(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert names == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        MANIFEST,
    }
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(tmp_path / "checkpoint-2" / name, weights_only=True)


def test_resuming_says_what_it_passes_over(tmp_path, caplog):
    run = trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
    run.train()
    (tmp_path / "checkpoint-3" / "optimizer.pt").write_bytes(b"half")
    (tmp_path / "checkpoint-2" / MANIFEST).unlink()
    again = trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match="cannot resume from .*checkpoint-3: optimizer.pt has 4 bytes, expected"):
        again.train(str(tmp_path / "checkpoint-3"))
    again.train(resume_from_checkpoint=True)
    assert "checkpoint-3 is passed over: optimizer.pt has 4 bytes" in caplog.text
    assert "checkpoint-2 is passed over: it has no complete.json" in caplog.text
    assert not why_incomplete(tmp_path / "checkpoint-3")
    assert_close(weights(again.model), weights(run.model), 1e-5)


@pytest.mark.parametrize("cut", [False, True])
def test_resuming_without_a_checkpoint_is_an_error(tmp_path, cut):
    if cut:  # by a kill in the middle of the first save
        (tmp_path / "checkpoint-1").mkdir()
    run = trainer(tmp_path)
    before = {name: weight.clone() for name, weight in weights(run.model).items()}
    with pytest.raises(ValueError, match=f"no complete checkpoint in {tmp_path}; name its folder"):
        run.train(resume_from_checkpoint=True)
    assert_close(weights(run.model), before, 0)


def test_resuming_with_another_model_is_an_error_and_with_other_options_a_warning(tmp_path, caplog):
    trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    trainer(tmp_path, tiny_model(margin=0.5)).train(True)
    assert "other options: margin 0.0 -> 0.5" in caplog.text
    with pytest.raises(ValueError, match="unknown keys|must have shape"):
        trainer(tmp_path, tiny_model(clues="top_k")).train(True)


def test_rotation_keeps_the_newest_whole_ones(tmp_path):
    for step in (5, 10, 15, 20):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "file").write_text("x")
        if step != 20:
            mark_complete(folder)
    assert last_complete(tmp_path)[0].name == "checkpoint-15"
    rotate(tmp_path, 2, {tmp_path / "checkpoint-5", tmp_path / "checkpoint-15"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-15", "checkpoint-5"]
    rotate(tmp_path, None, set())
    assert len(list(tmp_path.iterdir())) == 2


def test_a_lora_in_the_lm_is_trained_along(tmp_path):
    peft = pytest.importorskip("peft")

    def wrapped():
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        return tiny_model(peft.get_peft_model(tiny_lm("llama"), lora))

    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "deterministic": True}
    run = trainer(tmp_path, wrapped(), **settings)
    run.train()
    after = weights(run.model)
    assert any("lora_B" in name and bool(w.any()) for name, w in after.items())
    assert (tmp_path / "checkpoint-2" / "lm_adapter" / "adapter_model.safetensors").is_file()
    resumed = trainer(tmp_path, wrapped(), **settings)
    resumed.train(str(tmp_path / "checkpoint-2"))
    assert_close(weights(resumed.model), after, 0)


SCENARIOS = [
    "another run",
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    MANIFEST,
    "rotation",
    "first save",
    "random 0",
    "random 1",
    "with a cache",
]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Results of kill_and_resume.py: trainings killed in the middle of a file, or at any moment, then resumed."""
    script = Path(__file__).parents[1] / "jobs" / "kill_and_resume.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path_factory.mktemp("killed"))],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed_and_resumed_ends_the_same(killed, scenario):
    result = killed[scenario]
    assert result["difference"] <= 1e-5
    assert result["bit_equal"] or scenario == "with a cache"
    assert scenario == "another run" or result["restarts"] > 0 or scenario.startswith("random")


def test_the_kills_came(killed):
    assert sum(result["restarts"] for name, result in killed.items() if name.startswith("random")) > 0


@pytest.mark.parametrize(
    "cache_bytes, options, prefilled",
    [(1 << 20, {}, True), (100, {}, False), (0, {}, False), (1 << 20, {"num_virtual_tokens": 2}, False)],
    ids=str,
)
def test_passes_go_over_all_documents_that_the_cache_holds(tmp_path, monkeypatch, cache_bytes, options, prefilled):
    """Prefixes are computed in small passes, but read in large ones; trained prefixes are in no cache."""
    seen, forward = [], qpeft.QPeftModel.forward

    def spy(self, batch, *args, **given):
        seen.append(given["prefilled"])
        return forward(self, batch, *args, **given)

    monkeypatch.setattr(qpeft.QPeftModel, "forward", spy)
    trainer(tmp_path, tiny_model(temperature=0.1, **options), cache_bytes=cache_bytes, max_steps=1).train()
    assert seen == [prefilled]
