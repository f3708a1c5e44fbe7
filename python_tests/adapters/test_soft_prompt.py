"""The soft prompt as an option: prompt, start values, errors, files, caches, training, commands."""

from __future__ import annotations

import json

import pytest
import torch
from families.tiny import DOCUMENTS, PAIRS, QUERIES, tiny_lm, tiny_tokenizer
from jobs.tiny_job import make_job, save_adapter
from safetensors.torch import load_file
from transformers import TrainingArguments

import qpeft_ext as qpeft
from qpeft_ext.cli import main
from qpeft_ext.prefixes.index_writer import IndexWriter

pytestmark = pytest.mark.slow


def model(lm=None, **options) -> qpeft.QPeftModel:
    config = qpeft.QPeftConfig(**{"clues": "none", "num_virtual_tokens": 6, "rank": 8, "num_heads": 4} | options)
    return qpeft.get_qpeft_model(lm or tiny_lm("llama"), config, tiny_tokenizer())


def changed(of: qpeft.QPeftModel, seed: int = 0) -> qpeft.QPeftModel:
    """With another soft prompt, as after training."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in of.soft_prompt.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return of


def scores(of: qpeft.QPeftModel, cache=None, **options) -> torch.Tensor:
    return of.score(PAIRS, cache=cache, **options).query_log_likelihood


# -- prompt and start -----------------------------------------------------------------------------------------------


def test_it_stands_in_the_place_of_the_instruction():
    prompt, text = model().prompt, model(num_virtual_tokens=None).prompt
    for document in DOCUMENTS:
        soft, plain = prompt.documents([document])[0], text.documents([document])[0]
        assert soft.ids[:7] == (0,) * 7 and soft.document_ids == plain.document_ids  # <s> is 0 too
        assert prompt.tokenizer.decode(list(soft.ids[7:])).startswith(" Passage:")
        assert soft.ids[7:] == plain.ids[len(prompt.instruction_ids) + 1 :]
        assert prompt.offsets(document) == text.offsets(document)


def test_explanations_point_at_the_same_places():
    ours, text = (qpeft.Reranker(model(clues="top_k", k=3, num_virtual_tokens=P)) for P in (6, None))
    assert ours.explain(QUERIES[1], DOCUMENTS[3]) == text.explain(QUERIES[1], DOCUMENTS[3])
    assert ours.explain(QUERIES[1], DOCUMENTS[3]).clues


@pytest.mark.parametrize("P", [1, 3, 10])
def test_it_starts_as_the_text_repeated_or_cut(P):
    soft = model(num_virtual_tokens=P, instruction="Ask!", soft_prompt_mlp=4)
    ids = (tiny_tokenizer()("Ask!", add_special_tokens=False)["input_ids"] * 3)[:P]
    assert torch.equal(soft.soft_prompt(), soft.engine.table[ids])
    assert soft.soft_prompt().shape == (P, 32)


def test_a_random_start_is_tokens_drawn_with_the_seed():
    def rows(**options):
        return model(num_virtual_tokens=480, soft_prompt_init="random", **options).soft_prompt.rows

    table = tiny_lm("llama").get_input_embeddings().weight
    found = (rows()[:, None] == table).all(-1)
    assert found.any(1).all() and not found[:, :2].any()  # never <s> or </s>
    assert torch.equal(rows(), rows()) and not torch.equal(rows(), rows(seed=1))
    assert not torch.equal(rows(), model(num_virtual_tokens=480).soft_prompt.rows)
    model(soft_prompt_init="random", instruction="")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be at least 1, got 0"),
        ({"num_virtual_tokens": 2.0}, "num_virtual_tokens must be a whole number, got 2.0"),
        ({"num_virtual_tokens": 4, "soft_prompt_mlp": 0}, "soft_prompt_mlp must be at least 1, got 0"),
        (
            {"num_virtual_tokens": 4, "soft_prompt_init": "words"},
            "soft_prompt_init must be one of text, random, got 'wo",
        ),
        (
            {"num_virtual_tokens": None, "soft_prompt_init": "random"},
            "soft_prompt_init='random' is of a soft prompt; set",
        ),
        ({"num_virtual_tokens": None, "soft_prompt_mlp": 4}, "soft_prompt_mlp=4 is of a soft prompt; set num_virtual"),
        ({"instruction": " "}, "soft_prompt_init='text' needs an instruction; set one, or soft_prompt_init='random'"),
        (
            {"num_virtual_tokens": 493},
            r"must be at most 492, got 493: the LM's context is 512, and the rest .* takes 20",
        ),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        model(**options)


def test_a_prompt_that_is_too_long_with_the_soft_prompt():
    largest = model(num_virtual_tokens=491)
    assert largest.score([("a", "")]).query_log_likelihood.isfinite()
    with pytest.raises(ValueError, match="context of 512; lower max_document_tokens, num_virtual_tokens or max_query"):
        largest.score([("a", "b" * 30)])


# -- adapters and training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clues": "attention", "soft_prompt_mlp": 4},
        {"clues": "top_k", "generated_lora_rank": 2},
    ],
)
def test_saved_and_loaded_bit_equal(options, tmp_path, capsys):
    ours = changed(model(**options))
    ours.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(state["soft_prompt.rows"], ours.soft_prompt.rows)
    loaded = qpeft.QPeftModel.from_pretrained(tmp_path, tiny_lm("llama"), tiny_tokenizer())
    assert torch.equal(scores(loaded), scores(ours)) and not torch.equal(scores(loaded), scores(model(**options)))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    again = qpeft.QPeftModel.from_pretrained(tmp_path, tiny_lm("llama"), tiny_tokenizer(), is_trainable=True)
    trained = sum(tensor.numel() for tensor in state.values())
    again.print_trainable_parameters()
    assert f"trainable params: {trained:,} ||" in capsys.readouterr().out
    if not options:
        assert trained == 6 * 32


EXAMPLES = [{"query": f"tide {i}", "positives": [f"the moon {i}"], "negatives": ["boats", "wind"]} for i in range(4)]


@pytest.mark.parametrize("loss", ["pointwise", "listwise"])
def test_the_trainer_caches_for_evaluation_only(loss, tmp_path):
    ours = model(loss=loss, queries_per_group=2, suffix_micro_batch=2)
    trainer = qpeft.QPeftTrainer(
        model=ours,
        train_dataset=EXAMPLES,
        eval_dataset=EXAMPLES,
        cache_bytes=1 << 24,
        args=TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=2,
            num_train_epochs=3,
            learning_rate=0.05,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        ),
    )
    before = trainer.evaluate()
    stored, misses = len(trainer.cache), trainer.cache.misses
    assert stored == 6
    start = ours.soft_prompt.rows.clone()
    trainer.train()
    assert (len(trainer.cache), trainer.cache.misses) == (stored, misses)
    assert (ours.soft_prompt.rows - start).abs().max() > 0.05
    after = trainer.evaluate()
    assert trainer.cache.misses == misses + 6 and after["eval_loss"] < before["eval_loss"] - 0.1
    trainer.cache = None
    assert trainer.evaluate()["eval_loss"] == pytest.approx(after["eval_loss"], abs=1e-5)


# -- caches and files of prefixes -----------------------------------------------------------------------------------


def test_a_frozen_soft_prompt_is_cached_in_training_too(tmp_path):
    changed(model(clues="attention")).save_pretrained(tmp_path)
    ours = qpeft.QPeftModel.from_pretrained(tmp_path, tiny_lm("llama"), tiny_tokenizer())
    ours.clues.requires_grad_(True)
    cache = qpeft.DocumentCache()
    for _ in range(2):
        ours.train()(ours.encode(PAIRS), cache=cache).query_log_likelihood.sum().backward()
    assert cache.hits == cache.misses == len(DOCUMENTS)
    assert ours.soft_prompt.rows.grad is None


def test_models_of_one_lm_share_a_cache_but_no_prefix():
    lm, cache = tiny_lm("llama"), qpeft.DocumentCache()
    models = [model(lm, num_virtual_tokens=None), model(lm), changed(model(lm)), changed(model(lm), 1)]
    for _ in range(2):
        for one in models:
            torch.testing.assert_close(scores(one, cache), scores(one), rtol=0, atol=1e-4)
    assert cache.hits == cache.misses == len(models) * len(DOCUMENTS)


def test_files_know_the_soft_prompt_by_its_content(tmp_path):
    first, second = changed(model()), changed(model(), 1)
    expected = scores(first, deterministic=True)
    for ours, hits in ((first, 0), (second, 0), (changed(model()), len(DOCUMENTS)), (model(), 0)):
        cache = qpeft.DocumentCache(0, disk=tmp_path, disk_bytes=1 << 30)  # as in another process
        found = scores(ours, cache, deterministic=True)
        assert cache.hits == hits and torch.equal(found, scores(ours, deterministic=True))
        assert torch.equal(found, expected) == (ours is first or hits > 0)
        cache._disk._lock.close()


def test_an_index_belongs_to_its_soft_prompt(tmp_path):
    corpus = {
        str(i): document if isinstance(document, dict) else {"text": document} for i, document in enumerate(DOCUMENTS)
    }
    ours = changed(model())
    with IndexWriter(ours, corpus, tmp_path) as writer:
        writer.run(writer.survey())
    cache = qpeft.DocumentCache(0, index=tmp_path)
    torch.testing.assert_close(scores(changed(model()), cache), scores(ours), rtol=0, atol=1e-4)
    assert (cache.hits, cache.misses) == (len(DOCUMENTS), 0)
    for other in (changed(model(), 1), model(num_virtual_tokens=None)):
        with pytest.raises(ValueError, match="was made with another soft prompt, or with none"):
            scores(other, cache)
        with pytest.raises(ValueError, match="was made with another soft prompt, or with none"):
            IndexWriter(other, corpus, tmp_path)
    with pytest.raises(ValueError, match=r"another template \(template, special_tokens, instruction"):
        qpeft.Reranker(model(num_virtual_tokens=None), cache=cache).predict(PAIRS)


# -- commands -------------------------------------------------------------------------------------------------------


def test_train_index_and_rerank(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("QPEFT_CACHE", str(tmp_path / "cache"))
    job, adapter = make_job(tmp_path / "job"), tmp_path / "adapter"

    def command(*arguments) -> str:
        assert main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    examples = tmp_path / "train.jsonl"
    examples.write_text("\n".join(map(json.dumps, EXAMPLES)) + "\n")
    out = command(
        "train",
        "--base-model",
        job / "lm",
        "--train",
        examples,
        "--output",
        adapter,
        "--device",
        "cpu",
        "--clues",
        "none",
        "--option",
        "num_virtual_tokens=20",
        "--loss",
        "pointwise",
        "--max-steps",
        3,
    )
    assert "640 of " in out and "parameters are trained" in out
    command("index", job / "data", "--out", tmp_path / "index", "--model", adapter)
    rerank = [
        "rerank",
        "--model",
        adapter,
        "--data",
        job / "data",
        "--run",
        job / "data" / "run.trec",
        "--upr",
        "--similarity-only",
        "--output",
        tmp_path / "run.trec",
    ]
    plain = command(*rerank)
    for line in ("prompt tuning: 3 queries, 9 pairs", "UPR: 3 queries, 9 pairs", "similarity only: 3 queries, 9 pairs"):
        assert line in plain
    indexed = command(*rerank, "--index", tmp_path / "index")  # which UPR, with the instruction as text, cannot use
    assert indexed.count("100% cache hits") == 1

    plain, indexed = ([line for line in out.splitlines() if line.startswith("│")] for out in (plain, indexed))
    assert plain == indexed and len([line for line in plain if "prompt tuning" in line or "UPR" in line]) == 2


def test_with_clues_it_keeps_the_name_of_the_method(tmp_path):
    from qpeft_ext.ranking.systems import SystemsSpec

    lm = make_job(tmp_path / "job") / "lm"
    for place, (options, name) in enumerate(
        [
            ({"clues": "attention", "num_heads": 4, "num_virtual_tokens": 2}, "Q-PEFT-A"),
            ({"clues": "none", "num_virtual_tokens": 2}, "prompt tuning"),
            ({"clues": "none"}, "UPR adapter"),
        ]
    ):
        folder = save_adapter(tmp_path / str(place), lm, **options)
        assert SystemsSpec("data", model=str(folder), upr=True).names == [name, "UPR"]
