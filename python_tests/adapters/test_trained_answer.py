"""What an LM answered in training stays with the weights: a changed config is noticed; adapters without it load."""

import json

import pytest
import torch
from families.tiny import PAIRS, own_scores, tiny_lm, tiny_tokenizer
from safetensors.torch import load_file, save_file

import qpeft_ext as qpeft

WORDS = {"yes_words": ("y",), "no_words": ("n",)}


def saved(folder, **options):
    config = qpeft.QPeftConfig(**{"clues": "none", "generated_lora_rank": 2, "loss": "listwise", **options})
    model = qpeft.get_qpeft_model(tiny_lm("llama"), config, tiny_tokenizer())
    model.save_pretrained(folder)
    return model


def changed(folder, **options) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


def loaded(folder):
    return qpeft.QPeftModel.from_pretrained(folder, tiny_lm("llama"), tiny_tokenizer())


@pytest.mark.parametrize(("given", "options", "message"), [
    (WORDS, {"score": "graded", "yes_words": ["yes"], "no_words": ["no"]},
     "score is 'graded', and the weights beside it were trained with 'yes_no'; set it back"),
    (WORDS, {"yes_words": ["z"]}, "yes_words is ['z'], and the weights beside it were trained with ['y']"),
    (WORDS, {"exact_words": True}, "exact_words is True, and the weights beside it were trained with False"),
    ({"score": "graded", "max_grade": 3}, {"max_grade": 9}, "max_grade is 9, and the weights beside it were trained"),
    ({"score": "likelihood"}, {"score": "yes_no", **WORDS}, "score is 'yes_no', and the weights beside it were"),
])  # fmt: skip
def test_another_answer_than_in_training(tmp_path, given, options, message):
    saved(tmp_path, **{"score": "yes_no", **given})
    assert loaded(tmp_path).qpeft_config.score == {"score": "yes_no", **given}["score"]
    changed(tmp_path, **options)
    with pytest.raises(ValueError, match="adapter_config.json") as caught:
        loaded(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_metadata(tmp_path):
    saved(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt", "trained": "[1"})
    with pytest.raises(ValueError, match="its metadata is damaged; save the adapter again"):
        loaded(tmp_path)


def test_an_adapter_from_before_the_kinds_of_scores_is_of_the_likelihood(tmp_path):
    """Neither its config nor its weights say anything about a score."""
    saved(tmp_path)
    path, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config = json.loads(path.read_text())
    for name in ("score", "ask", "yes_words", "no_words", "exact_words", "max_grade"):
        del config[name]
    path.write_text(json.dumps(config))
    save_file(load_file(weights), weights, metadata={"format": "pt"})
    model = loaded(tmp_path)
    assert model.qpeft_config.score == "likelihood" and not model.ranks_by_mean and model.answer is None
    scores = model.score(PAIRS).query_log_likelihood  # a generated LoRA begins as no change of the LM
    torch.testing.assert_close(scores, own_scores(model, PAIRS), rtol=1e-5, atol=1e-5)


def test_the_same_weights_are_the_same_bytes(tmp_path):
    """Safetensors writes several entries of metadata in an order that changes from file to file."""
    model = saved(tmp_path / "0", **{"score": "yes_no", **WORDS})
    for name in "1234567":
        model.save_pretrained(tmp_path / name)
    assert len({(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "01234567"}) == 1
