"""An adapter on an LM that has an adapter of peft itself."""

import pytest
from families.tiny import tiny_lm, tiny_tokenizer
from peft import LoraConfig, get_peft_model

import qpeft_ext as qpeft


@pytest.fixture
def lora(job, tmp_path):
    """An adapter folder whose LM has a LoRA."""
    lm = get_peft_model(tiny_lm("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="top_k", k=2, rank=4), tiny_tokenizer())
    model.save_pretrained(tmp_path / "lora")
    return model, tmp_path / "lora"
