"""Special tokens before a prompt: those that the tokenizer puts there, or always BOS, as in old adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families.tiny import PAIRS, tiny_lm, tiny_tokenizer

import qpeft_ext as qpeft
from qpeft_ext.prefixes.index_writer import IndexWriter
from qpeft_ext.prompts.prompt import Prompt

DEMO = Path(qpeft.__file__).parent / "demo"
# float32; recorded with the version before the option, which put BOS before every prefix
RECORDED = {("read a json file", "def load(path): return json.loads(path.read_text())"): -10.59486,
            ("tides", "moon and sea"): -19.49567}  # fmt: skip


def model_with(around: str = "$A", **options) -> qpeft.QPeftModel:
    config = qpeft.QPeftConfig(**{"clues": "top_k", "k": 3, "rank": 8, **options})
    return qpeft.get_qpeft_model(tiny_lm("llama"), config, tiny_tokenizer(around))


def head_of(model) -> tuple[int, ...]:
    prefix = model.prompt.documents(["sea"])[0]
    plain = tuple(
        model.tokenizer(f"{model.qpeft_config.instruction} Passage: sea\n", add_special_tokens=False)["input_ids"]
    )
    assert prefix.ids[-len(plain) :] == plain
    return prefix.ids[: -len(plain)]


@pytest.mark.parametrize("around, rule, expected", [
    ("$A", "auto", ()), ("$A", "tokenizer", ()), ("$A", "bos", (0,)),
    ("<s> $A", "auto", (0,)), ("<s> $A", "bos", (0,)),
    ("</s> <s> $A </s>", "auto", (1, 0)),  # what it puts after a text would stand between document and query
])  # fmt: skip
def test_the_rule_decides_what_stands_before_a_prefix(around, rule, expected):
    model = model_with(around, special_tokens=rule)
    assert head_of(model) == expected
    assert model.qpeft_config.special_tokens == ("bos" if rule == "bos" else "tokenizer")


def test_a_tokenizer_without_bos_puts_none():
    tokenizer = tiny_tokenizer("$A")
    tokenizer.bos_token = None
    for rule in ("tokenizer", "bos"):
        prompt = Prompt(tokenizer, qpeft.QPeftConfig(special_tokens=rule))
        assert tokenizer.decode(prompt.documents(["sea"])[0].ids).startswith("Please")


def test_an_adapter_keeps_its_rule(tmp_path):
    for rule in ("auto", "bos"):
        model = model_with(special_tokens=rule)
        model.save_pretrained(tmp_path / rule)
        loaded = qpeft.QPeftModel.from_pretrained(tmp_path / rule, tiny_lm("llama"), tiny_tokenizer("$A"))
        assert loaded.qpeft_config.special_tokens == model.qpeft_config.special_tokens != "auto"
        assert torch.equal(loaded.score(PAIRS).query_log_likelihood, model.score(PAIRS).query_log_likelihood)


def test_an_adapter_from_before_the_option_scores_as_it_did(tmp_path):
    adapter = json.loads((DEMO / "adapter" / "adapter_config.json").read_text())
    assert "special_tokens" not in adapter, "the packaged adapter is the example of an old one"
    # in float32: bfloat16, in which the LM is stored, differs between processors in the second decimal
    model = qpeft.QPeftModel.from_pretrained(DEMO / "adapter", qpeft.load_lm(DEMO / "base_lm", dtype="float32"))
    assert model.qpeft_config.special_tokens == "bos" and head_of(model) == (0,)
    scores = model.score(list(RECORDED)).query_log_likelihood
    assert scores.tolist() == pytest.approx(list(RECORDED.values()), abs=1e-4)
    now = model_with(special_tokens="bos")
    now.save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "special_tokens"}))
    then = qpeft.QPeftModel.from_pretrained(tmp_path, tiny_lm("llama"), tiny_tokenizer("$A"))
    assert torch.equal(then.score(PAIRS).query_log_likelihood, now.score(PAIRS).query_log_likelihood)


def test_the_packaged_tokenizer_puts_the_token_that_its_lm_was_trained_with():
    model = qpeft.get_qpeft_model(qpeft.load_lm(DEMO / "base_lm"), qpeft.QPeftConfig(clues="none"))
    assert model.qpeft_config.special_tokens == "tokenizer" and head_of(model) == (0,)


def test_an_index_belongs_to_its_special_tokens(tmp_path):
    with IndexWriter(model_with(special_tokens="bos"), {"d": {"title": "", "text": "tides"}}, tmp_path) as writer:
        writer.run(writer.survey())
    cache = qpeft.DocumentCache(0, index=tmp_path)
    qpeft.Reranker(model_with(special_tokens="bos", seed=1), cache=cache).predict([("why?", "tides")])
    assert cache.index.hits == 1
    with pytest.raises(ValueError, match=r"another template \(template, special_tokens, instruction"):
        qpeft.Reranker(model_with(), cache=cache).predict([("why?", "tides")])


def test_an_encoder_decoder_reads_what_its_tokenizer_makes():
    for rule in ("auto", "bos"):  # an adapter of an earlier version has "bos"
        config = qpeft.QPeftConfig(clues="none", special_tokens=rule)
        model = qpeft.get_qpeft_model(tiny_lm("t5"), config, tiny_tokenizer("$A </s>"))
        ids = model.prompt.documents(["sea"])[0].ids
        assert model.qpeft_config.special_tokens == "tokenizer" and (ids[0], ids[-1]) != (0, 0) and ids[-1] == 1


def test_impossible_rules_are_errors():
    with pytest.raises(
        ValueError, match="special_tokens must be one of auto, tokenizer, bos, got 'boss'; did you mean"
    ):
        qpeft.QPeftConfig(special_tokens="boss")
    with pytest.raises(ValueError, match="compat='official' has special_tokens='bos' and nothing else"):
        qpeft.QPeftConfig(compat="official", special_tokens="tokenizer")
    assert qpeft.QPeftConfig(compat="official").special_tokens == "bos"
