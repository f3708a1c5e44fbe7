"""Steps of QPeftTrainer: the loss and its normalisation, micro-batches, memory, the schedule."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from families.tiny import tiny_lm
from training.tiny_training import EXAMPLES, Stream, assert_close, tiny_model, trainer, weights

import qpeft_ext as qpeft
from qpeft_ext.lm.passes import without_cudnn_attention

pytestmark = pytest.mark.slow


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
    assert trained.counts.documents_read == whole.counts.documents_read  # not counted twice
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
    fit = trainer(tmp_path, model, EXAMPLES[:4], EXAMPLES[:4], max_steps=9, learning_rate=4e-2, cache_bytes=1 << 20)
    before = fit.evaluate()["eval_loss"]
    fit.train()
    assert fit.evaluate()["eval_loss"] < before - 0.5
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
    workers = {"dataloader_num_workers": 2}
    for given in (settings, {"dev": Stream()}, {"dev": {"a": EXAMPLES, "b": Stream()}}):
        with pytest.raises(ValueError, match="dataloader_num_workers=0"):
            trainer(tmp_path, **given | workers)
    with pytest.raises(ValueError, match="dataloader_num_workers=0"):
        trainer(tmp_path, **workers).predict(Stream())  # each worker would read all of it


def test_a_datasets_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    expected, given = (trainer(tmp_path, examples=e) for e in (EXAMPLES, datasets.Dataset.from_list(EXAMPLES)))
    expected.train(), given.train()
    assert_close(weights(given.model), weights(expected.model), 0)


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
