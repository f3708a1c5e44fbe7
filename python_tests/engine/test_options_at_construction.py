"""What a model is made of says what it does: no option is set on a part of it afterwards."""

import json

import torch
from families.tiny import tiny_lm, tiny_tokenizer

import qpeft_ext as qpeft

LONG = "tides rise and fall with the moon"


def test_limits_given_when_an_adapter_is_loaded_are_those_of_its_config(tmp_path):
    lm, tokenizer = tiny_lm("llama"), tiny_tokenizer()
    qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="top_k"), tokenizer).save_pretrained(tmp_path)
    limits = {"max_document_tokens": 5, "max_query_tokens": 7}
    for loaded in (
        qpeft.QPeftModel.from_pretrained(tmp_path, lm, tokenizer, **limits),
        qpeft.Reranker.from_pretrained(tmp_path, lm, tokenizer=tokenizer, **limits).model,
    ):
        assert {name: getattr(loaded.qpeft_config, name) for name in limits} == limits
        assert len(loaded.prompt.documents([LONG])[0].document_ids) == 5
    assert json.loads((tmp_path / "adapter_config.json").read_text())["max_document_tokens"] == 256
    assert qpeft.QPeftModel.from_pretrained(tmp_path, lm, tokenizer).qpeft_config.max_document_tokens == 256


def test_an_engine_for_another_dtype_keeps_the_soft_prompt():
    model = qpeft.get_qpeft_model(
        tiny_lm("llama"), qpeft.QPeftConfig(clues="none", num_virtual_tokens=3), tiny_tokenizer()
    )
    before = model.engine
    assert before.soft_prompt is model.soft_prompt is not None
    model.to(torch.bfloat16).score([("boats", LONG)])
    assert model.engine is not before and model.engine.soft_prompt is model.soft_prompt
