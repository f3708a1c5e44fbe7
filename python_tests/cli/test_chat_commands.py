"""``--template`` and ``--special-tokens`` of the commands: index, rerank and train read the same prompt."""

from __future__ import annotations

import pytest
from families.tiny import tiny_lm, tiny_tokenizer
from small_data import QUERIES, write_folder

import qpeft_ext as qpeft
from qpeft_ext import formats
from qpeft_ext.cli import main

pytestmark = pytest.mark.slow


CHAT = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    write_folder(folder / "data")
    tiny_lm("llama").save_pretrained(folder / "lm")
    tokenizer = tiny_tokenizer("$A")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder / "lm")
    return folder


def run(command: str, *options) -> int:
    return main([command, *map(str, options), "--device", "cpu"])


def rerank(job, output, *options) -> int:
    data = job / "data"
    return run("rerank", "--data", data, "--run", data / "run.trec", "--output", output, *options)


@pytest.mark.parametrize("name, value, other", [("template", "chat", "qpeft"), ("special_tokens", "bos", "tokenizer")])
def test_an_index_and_upr_have_the_prompt_that_is_asked_for(job, tmp_path, capsys, name, value, other):
    flag, lm, index = f"--{name.replace('_', '-')}", ("--base-model", job / "lm"), tmp_path / "index"
    assert run("index", job / "data", "--out", index, *lm, flag, value) == 0, capsys.readouterr().err
    out = tmp_path / "out.trec"
    assert rerank(job, out, *lm, "--upr", flag, value, "--index", index) == 0, capsys.readouterr().err
    config = qpeft.QPeftConfig(clues="none", **{name: value})
    reranker = qpeft.Reranker(qpeft.get_qpeft_model(qpeft.load_lm(job / "lm"), config))
    corpus = formats.Corpus(job / "data")
    for query_id, ranking in formats.read_run(out).items():
        scores = reranker.predict([(QUERIES[query_id], corpus[doc_id]) for doc_id, _ in ranking])
        assert [score for _, score in ranking] == pytest.approx(scores.tolist(), abs=1e-3)
    assert rerank(job, tmp_path / "b.trec", *lm, "--upr", flag, other, "--index", index) == 2
    assert "was made with another template (template, special_tokens" in capsys.readouterr().err


def test_an_adapter_keeps_the_template_that_it_was_trained_with(job, tmp_path, capsys):
    adapter, index = tmp_path / "adapter", tmp_path / "index"
    assert run("train", "--base-model", job / "lm", "--data", job / "data", "--output", adapter, "--template", "chat",
               "--max-steps", 1, "--rank", 4, "--generated-lora-rank", 2) == 0, capsys.readouterr().err  # fmt: skip
    config = qpeft.QPeftConfig.from_pretrained(adapter)
    assert (config.template, config.special_tokens) == ("chat", "tokenizer")
    assert run("index", job / "data", "--out", index, "--model", adapter) == 0, capsys.readouterr().err
    assert rerank(job, tmp_path / "out.trec", "--model", adapter, "--upr", "--index", index) == 0
    capsys.readouterr()
    told = "the adapter was trained with template 'chat', got 'upr'; leave --template out"
    asked = ("--model", adapter, "--template", "upr")
    assert rerank(job, tmp_path / "b.trec", *asked) == 2
    assert told in capsys.readouterr().err
    assert run("index", job / "data", "--out", tmp_path / "other", *asked) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_an_lm_without_a_chat_template_is_one_clear_error(job, tmp_path, capsys):
    tiny_lm("llama").save_pretrained(tmp_path / "lm")
    tiny_tokenizer().save_pretrained(tmp_path / "lm")
    lm = ("--base-model", tmp_path / "lm", "--template", "chat")
    assert run("index", job / "data", "--out", tmp_path / "index", *lm) == 2
    assert rerank(job, tmp_path / "b.trec", *lm, "--upr") == 2
    errors = capsys.readouterr().err.splitlines()
    assert len([line for line in errors if "needs an LM with a chat template, but its tokenizer has none" in line]) == 2
    assert not (tmp_path / "index").exists()
