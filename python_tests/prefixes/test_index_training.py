"""Training with an index."""

from __future__ import annotations

import pytest
import torch
import transformers
from families.tiny import tiny_lm, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from small_data import QUERIES
from tiny_index import command, corpus, error, make

import qpeft_ext as qpeft
from qpeft_ext.cli import main
from qpeft_ext.engine.causal import CausalEngine

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache_folder")]


def trained(of, folder, **options) -> dict[str, torch.Tensor]:
    """Weights after two steps."""
    examples = [
        {"query": query, "positives": [corpus()[i]], "negatives": [corpus()["d1" if i != "d1" else "d2"]]}
        for query, i in zip(QUERIES.values(), corpus(), strict=False)
    ]
    arguments = transformers.TrainingArguments(
        str(folder / "out"),
        per_device_train_batch_size=len(examples),
        max_steps=2,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = qpeft.QPeftTrainer(of, arguments, examples, **options)
    trainer.train()
    return {name: p.detach() for name, p in of.named_parameters() if p.requires_grad}


def clues_model(lm=None, **options) -> qpeft.QPeftModel:
    config = qpeft.QPeftConfig(
        **{"clues": "attention", "num_heads": 4, "rank": 8, "queries_per_group": len(QUERIES), "temperature": 1.0}
        | options
    )
    return qpeft.get_qpeft_model(lm or tiny_lm("llama"), config, tiny_tokenizer())


def test_training_with_an_index(tmp_path, monkeypatch):
    """The same weights, and no document is read, whatever is trained beside the LM."""
    make(tmp_path / "index")
    for options in ({}, {"clues": "top_k"}, {"clues": "none", "generated_lora_rank": 2}):
        expected = trained(clues_model(**options), tmp_path)
        cache = qpeft.DocumentCache(0, index=tmp_path / "index")
        with monkeypatch.context() as patch:
            patch.setattr(CausalEngine, "prefill", lambda *_: pytest.fail("a prefix was computed"))
            found = trained(clues_model(**options), tmp_path, cache=cache)
        assert found.keys() == expected.keys() and cache.hits and not cache.misses
        for name, weight in found.items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5)


def test_training_refuses_an_index_that_is_of_no_use(tmp_path):
    make(tmp_path / "index")
    cache = qpeft.DocumentCache(0, index=tmp_path / "index")
    lora = get_peft_model(tiny_lm("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    for of in (clues_model(lora), clues_model(num_virtual_tokens=2), clues_model(train_lm=True, clues="none")):
        with pytest.raises(ValueError, match="^QPeftTrainer: an index is of no use to this model: its soft prompt, or"):
            trained(of, tmp_path, cache=cache)
    with pytest.raises(ValueError, match="^QPeftTrainer: an index is of no use to this model: layout='clues_first'"):
        trained(clues_model(layout="clues_first"), tmp_path, cache=cache)
    with pytest.raises(ValueError, match="was made with max_document_tokens 256, here it is 9"):
        trained(clues_model(max_document_tokens=9), tmp_path, cache=cache)
    with pytest.raises(ValueError, match="was made with an LM with other weights"):
        trained(clues_model(tiny_lm("llama", 1)), tmp_path, cache=cache)
    with pytest.raises(ValueError, match="cache and cache_bytes exclude each other"):
        trained(clues_model(), tmp_path, cache=cache, cache_bytes=1)


def test_train_with_an_index(job, tmp_path, capsys, monkeypatch):
    arguments = [
        "train",
        "--base-model",
        job / "lm",
        "--data",
        job / "data",
        "--rank",
        8,
        "--max-steps",
        2,
        "--device",
        "cpu",
        "--output",
    ]
    assert "none is no index" in error(capsys, *arguments, tmp_path / "no", "--index", tmp_path / "none")
    assert not (tmp_path / "no").exists()
    assert main([str(a) for a in (*arguments, tmp_path / "plain")]) == 0
    command(capsys, "index", job / "data", "--out", tmp_path / "index", "--base-model", job / "lm")
    monkeypatch.setattr(CausalEngine, "prefill", lambda *_: pytest.fail("a prefix was computed"))
    assert main([str(a) for a in (*arguments, tmp_path / "mine", "--index", tmp_path / "index")]) == 0
    plain, mine = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "mine"))
    for name, weight in mine.items():
        torch.testing.assert_close(weight, plain[name], rtol=0, atol=1e-4)
