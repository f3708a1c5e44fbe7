"""Something else in the place of an LM or a model is an error that names the right call."""

from pathlib import Path

import pytest
import torch
from families.tiny import tiny_lm, tiny_tokenizer
from transformers import LlamaForTokenClassification

import qpeft_ext as qpeft


class TextGenerationPipeline:
    def __init__(self, model, tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer


WRONG_MODELS = {
    "a name": (lambda lm, tok, conf: qpeft.get_qpeft_model("gpt2", conf), "the string 'gpt2'; load_lm(name) loads one"),
    "a path": (lambda lm, tok, conf: qpeft.QPeftModel(Path("x"), conf, tok), "load_lm(name) loads one"),
    "a pipeline": (
        lambda lm, tok, conf: qpeft.get_qpeft_model(TextGenerationPipeline(lm, tok), conf),
        "a pipeline (TextGenerationPipeline); give its model: pipeline.model",
    ),
    "a class": (lambda lm, tok, conf: qpeft.get_qpeft_model(type(lm), conf, tok), "LlamaForCausalLM.from_pretrained"),
    "a tokenizer": (lambda lm, tok, conf: qpeft.get_qpeft_model(tok, conf, lm), "got a tokenizer"),
    "a config": (lambda lm, tok, conf: qpeft.get_qpeft_model(conf, lm, tok), "a QPeftConfig, which comes after the LM"),
    "a tagger": (
        lambda lm, tok, conf: qpeft.get_qpeft_model(LlamaForTokenClassification(lm.config), conf, tok),
        "a LlamaForTokenClassification, which does not write text; load the LM itself",
    ),
    "a module": (lambda lm, tok, conf: qpeft.get_qpeft_model(torch.nn.Linear(2, 2), conf, tok), "the module Linear"),
    "a model of ours": (
        lambda lm, tok, conf: qpeft.get_qpeft_model(qpeft.get_qpeft_model(lm, conf, tok), conf, tok),
        "take its own: model.lm",
    ),
    "options": (lambda lm, tok, conf: qpeft.get_qpeft_model(lm, {"clues": "none"}, tok), "config must be a QPeftCon"),
    "swapped": (lambda lm, tok, conf: qpeft.QPeftModel(lm, tok, conf), "got a tokenizer, which comes after it"),
    "a tokenizer's name": (lambda lm, tok, conf: qpeft.get_qpeft_model(lm, conf, "gpt2"), "AutoTokenizer.from_pretr"),
    "an LM": (lambda lm, tok, conf: qpeft.Reranker(lm), "wrap it: Reranker(get_qpeft_model(lm, QPeftConfig("),
    "an adapter's name": (lambda lm, tok, conf: qpeft.Reranker("my-adapter"), "Reranker.from_pretrained(…) loads an"),
    "a tokenizer to rank": (lambda lm, tok, conf: qpeft.Reranker(tok), "model must be a QPeftModel, got a tokenizer"),
}


@pytest.mark.parametrize("name", WRONG_MODELS)
def test_what_is_no_lm_is_an_error_that_names_the_right_call(name):
    call, words = WRONG_MODELS[name]
    with pytest.raises(TypeError) as caught:
        call(tiny_lm("llama"), tiny_tokenizer(), qpeft.QPeftConfig(clues="none"))
    message = str(caught.value)
    assert words in message and "\n" not in message and len(message) <= 300
