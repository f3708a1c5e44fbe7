"""The state of torch outside (autocast, default dtype and device, inference mode, grad mode) changes no score."""

from __future__ import annotations

import contextlib
import copy

import numpy as np
import pytest
import torch
import transformers
from families.tiny import PAIRS, QUERIES, tiny_lm, tiny_tokenizer
from safetensors.torch import load_file

import qpeft_ext as qpeft
from qpeft_ext import ops
from qpeft_ext.ops.vocabulary_topk import vocabulary_topk

pytestmark = pytest.mark.slow

KINDS = {
    "none": {"clues": "none"},
    "top_k": {"clues": "top_k", "k": 4, "rank": 8, "score_gate": True},
    "attention": {"clues": "attention", "num_heads": 4, "rank": 8},
    "generated": {"clues": "top_k", "k": 4, "rank": 8, "generated_lora_rank": 2, "target_modules": "all-linear"},
    "soft_prompt": {"clues": "none", "num_virtual_tokens": 3, "soft_prompt_mlp": 8},
}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default float64": lambda: default_dtype(torch.float64),
    "default device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "deterministic algorithms": deterministic_algorithms,
    "anomaly mode": torch.autograd.detect_anomaly,
}


def make(kind: str, dtype: torch.dtype = torch.float32, lm=None) -> qpeft.QPeftModel:
    lm = tiny_lm("llama", dtype=dtype) if lm is None else lm
    return qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(**KINDS[kind]), tiny_tokenizer())


def moved(model: qpeft.QPeftModel) -> qpeft.QPeftModel:
    """With trained modules that are not at their start, the same each time."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.trained_modules.values():
            for parameter in module.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def with_cache(model: qpeft.QPeftModel) -> np.ndarray:
    return qpeft.Reranker(model, cache=qpeft.DocumentCache(1 << 20)).predict(PAIRS)


def trained_dtypes(model: qpeft.QPeftModel) -> set[torch.dtype]:
    return {parameter.dtype for module in model.trained_modules.values() for parameter in module.parameters()}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("kind", KINDS)
def test_scores_do_not_depend_on_it(kind):
    model = moved(make(kind))
    reranker, generator = qpeft.Reranker(model), torch.get_rng_state()
    right, ranked = reranker.predict(PAIRS), reranker.rank(QUERIES[0], ["tides", "boats"])
    explained, cached = reranker.explain(*PAIRS[0]), with_cache(model)
    for name, state in STATES.items():
        with state():
            assert (reranker.predict(PAIRS) == right).all(), name
            assert reranker.rank(QUERIES[0], ["tides", "boats"]) == ranked, name
            assert reranker.explain(*PAIRS[0]).gate_norms == explained.gate_norms, name
            assert (with_cache(model) == cached).all(), name
            if torch.is_grad_enabled() and trained_dtypes(model):
                scores = model(model.encode(PAIRS)).query_log_likelihood
                assert scores.dtype == torch.float32 and scores.requires_grad, name
    assert torch.equal(torch.get_rng_state(), generator)  # nothing was drawn


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_the_same_wherever_it_is_built(kind, tmp_path):
    right = make(kind)
    scores = right.score(PAIRS).query_log_likelihood
    right.save_pretrained(tmp_path / "right")
    lm, generator = tiny_lm("llama"), torch.get_rng_state()
    for name in ("default bfloat16", "default float64", "default device", "inference mode"):
        with STATES[name]():
            built = make(kind, lm=lm)
            built.save_pretrained(tmp_path / "built")
            loaded = qpeft.QPeftModel.from_pretrained(tmp_path / "built", lm, tiny_tokenizer(), is_trainable=True)
        for model in (built, loaded):
            assert trained_dtypes(model) <= {torch.float32}, name
            assert torch.equal(model.score(PAIRS).query_log_likelihood, scores), name
            assert all(
                p.requires_grad and not p.is_inference() and p.device.type == "cpu"
                for module in model.trained_modules.values()
                for p in module.parameters()
            ), name
        first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("right", "built"))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first), name
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
def test_gradients_do_not_depend_on_it(kind):
    model = moved(make(kind))
    model.qpeft_config.suffix_micro_batch = None if kind == "top_k" else 4  # computed again in the backward pass
    cache = qpeft.DocumentCache(1 << 20)

    def gradients(state=contextlib.nullcontext, around_backward=contextlib.nullcontext) -> list[torch.Tensor]:
        model.zero_grad()
        with state():
            loss = model(model.encode(PAIRS), cache=cache).mean_query_log_likelihood.sum()
        with around_backward():
            loss.backward()
        return [p.grad.clone() for module in model.trained_modules.values() for p in module.parameters()]

    right = gradients()
    for name, state in STATES.items():
        if name in ("no grad", "inference mode"):
            with state():
                qpeft.Reranker(model, cache=cache).predict(PAIRS)  # what it leaves in caches can be trained with
            found = gradients()
        else:
            around_backward = contextlib.nullcontext if name.startswith("autocast") else state
            found = gradients(state, around_backward)
        assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True)), name
    with pytest.raises(ValueError, match="backward.. was called inside torch.autocast"):
        gradients(STATES["autocast"], STATES["autocast"])


def test_operators_are_not_autocast():
    generator = torch.Generator().manual_seed(0)
    table, hidden, *weights = (torch.randn(*shape, 16, generator=generator) for shape in ((50,), (5,), *4 * [(16,)]))
    ids, mask = torch.randint(50, (4, 6), generator=generator), torch.ones(4, 6, dtype=torch.bool)
    queries = (table[ids[:2, :3]], mask[:2, :3])
    documents = (ids, mask, torch.tensor([0, 0, 1, 1]))

    def results() -> list[torch.Tensor]:
        projected = ops.ProjectedTable(table, *weights[1:3], budget_bytes=1 << 20)
        return [
            ops.similarity_topk(*queries, table, *documents, 3).scores,
            ops.clue_attention(*queries, table, *documents, *weights, num_heads=2),
            projected.attend(*queries, *documents, weights[0], weights[3], num_heads=2),
            ops.token_log_likelihood(hidden, table, ids[0, :5]),
            vocabulary_topk(*queries, table, torch.ones(1, 50, dtype=torch.bool), 3),
        ]

    expected = results()
    with STATES["autocast"]():
        assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True))


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_a_trainer_does_not_depend_on_it(tmp_path):
    examples = [
        {
            "query_id": f"q{i}",
            "query": word,
            "positives": [{"id": f"p{i}", "text": f"{word} by the sea"}],
            "negatives": [{"id": f"n{i}", "text": "a note of lamps"}],
        }
        for i, word in enumerate(("tides", "boats", "fog", "nets"))
    ]

    def train(state=contextlib.nullcontext) -> tuple[dict, dict[str, torch.Tensor]]:
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=2,
            learning_rate=1e-2,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            report_to=[],
        )
        model = qpeft.get_qpeft_model(
            tiny_lm("llama"), qpeft.QPeftConfig(**KINDS["attention"], temperature="auto"), tiny_tokenizer()
        )
        with state():
            trainer = qpeft.QPeftTrainer(model, arguments, examples, examples, cache_bytes=1 << 20)
            trainer.evaluate()
            trainer.train()
            measures = trainer.evaluate()
        return measures["eval_loss"], model.clues.state_dict()

    loss, weights = train()
    for name in ("autocast", "default bfloat16", "default device", "inference mode"):
        found, others = train(STATES[name])
        assert found == loss and all(torch.equal(weights[key], others[key]) for key in weights), name


def test_weights_of_the_lm_that_would_be_lost_are_not_trained(tmp_path):
    model = make("attention")
    model.lm.requires_grad_()
    with pytest.raises(ValueError, match=r"does not save them \(.*\); call lm.requires_grad_"):
        qpeft.QPeftTrainer(
            model, transformers.TrainingArguments(str(tmp_path), per_device_train_batch_size=4, use_cpu=True)
        )


def test_an_lm_made_in_inference_mode_scores_and_is_not_trained(tmp_path):
    with torch.inference_mode():
        lm = tiny_lm("llama")
    model = make("attention", lm=lm)
    assert torch.equal(model.score(PAIRS).likelihood, make("attention").score(PAIRS).likelihood)
    with pytest.raises(ValueError, match="made in torch.inference_mode, .* load it outside"):
        qpeft.QPeftTrainer(
            model, transformers.TrainingArguments(str(tmp_path), per_device_train_batch_size=4, use_cpu=True)
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", ["bfloat16", "half", "double"])
def test_another_dtype_is_that_of_the_lm_alone(kind, change):
    dtype = {"bfloat16": torch.bfloat16, "half": torch.float16, "double": torch.float64}[change]
    right = make(kind, lm=tiny_lm("llama").to(dtype))
    for prefix, module in moved(make(kind)).trained_modules.items():
        right.trained_modules[prefix].load_state_dict(module.state_dict())
    expected, cached = qpeft.Reranker(right).predict(PAIRS), with_cache(right)
    for convert in (lambda m: getattr(m, change)(), lambda m: m.lm.to(dtype)):
        model = moved(make(kind))
        reranker = qpeft.Reranker(model, cache=qpeft.DocumentCache(1 << 20))
        reranker.predict(PAIRS)
        convert(model)
        assert trained_dtypes(model) <= {torch.float32}
        assert {p.dtype for p in model.lm.parameters()} == {dtype}
        assert (reranker.predict(PAIRS) == cached).all()
        assert (qpeft.Reranker(model).predict(PAIRS) == expected).all()
        for module in model.trained_modules.values():
            module.to(dtype)
        assert trained_dtypes(model) <= {torch.float32}


def test_a_copy_scores_alike_and_is_a_model_of_its_own():
    for kind in KINDS:
        model = moved(make(kind))
        right = qpeft.Reranker(model).predict(PAIRS)
        other = copy.deepcopy(model)
        assert (qpeft.Reranker(other).predict(PAIRS) == right).all()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter += 1e-2
        assert (qpeft.Reranker(other).predict(PAIRS) != right).any()
        assert (qpeft.Reranker(model).predict(PAIRS) == right).all()


def test_an_lm_that_somebody_puts_into_train_mode_is_taken_out_of_it():
    model = make("attention", lm=tiny_lm("gpt2", resid_pdrop=0.5))
    right = qpeft.Reranker(model).predict(PAIRS)
    model.lm.train()
    assert (qpeft.Reranker(model).predict(PAIRS) == right).all()
    model.train().lm.train()
    model.score(PAIRS)
    assert not model.lm.training and model.clues.training


def test_scores_made_while_training_have_no_dropout():
    model = qpeft.get_qpeft_model(
        tiny_lm("llama"), qpeft.QPeftConfig(clues="attention", num_heads=4, rank=8, dropout=0.5), tiny_tokenizer()
    )
    reranker = qpeft.Reranker(model)
    right = reranker.predict(PAIRS)
    model.train()
    assert (reranker.predict(PAIRS) == right).all() and model.training


def test_an_lm_without_memory_is_refused():
    with torch.device("meta"):
        lm = tiny_lm("llama")
    with pytest.raises(ValueError, match="meta device, without values; load the LM outside"):
        make("none", lm=lm)


def test_a_compiled_lm_is_taken_as_it_is(caplog):
    lm = tiny_lm("llama")
    right = make("top_k", lm=lm).score(PAIRS).query_log_likelihood
    model = make("top_k", lm=torch.compile(lm))
    assert "torch.compile" in caplog.text and model.lm is lm
    assert torch.equal(model.score(PAIRS).query_log_likelihood, right)
