"""UPR's own setting, and encoder–decoder LMs at the command line."""

from __future__ import annotations

import pytest
import torch
from families.tiny import DOCUMENTS, PAIRS, QUERIES, tiny_lm, tiny_tokenizer
from jobs.tiny_job import save_lm
from small_data import QUERIES as ASKED
from small_data import RUN, write_folder

import qpeft_ext as qpeft
from qpeft_ext import formats
from qpeft_ext.cli import main
from qpeft_ext.prompts.prompt import Prompt, document_text

pytestmark = pytest.mark.slow

INSTRUCTION = "Please write a question based on this passage."


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_causal_lm_reads_uprs_prompt(family):
    """One text a pair, tokenised as a whole: Σ log p of the query's tokens, none other."""
    lm, tokenizer, scores = tiny_lm(family), tiny_tokenizer(), {}
    model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="none", template="upr"), tokenizer)
    pairs = [*PAIRS, ("?", DOCUMENTS[0])]  # a query of one token (and its space)
    for path in ("document_first", "plain"):
        scores[path] = model.score(pairs, path=path)
    for i, (query, document) in enumerate(pairs):
        text = document_text(document)
        prompt = f"<s>Passage: {text}. {INSTRUCTION}" if text else f"<s>Passage:. {INSTRUCTION}"
        before, whole = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, f"{prompt} {query}")
        )
        targets = whole[len(before) :]
        with torch.no_grad():
            log_p = lm(input_ids=torch.tensor([whole])).logits[0, len(before) - 1 : -1].log_softmax(-1)
        expected = float(log_p[torch.arange(len(targets)), torch.tensor(targets)].sum()) / len(targets)
        for score in scores.values():
            assert score.num_tokens[i] == len(targets)
            assert float(score.mean_query_log_likelihood[i]) == pytest.approx(expected, abs=1e-5)


def test_clues_stand_before_the_instruction():
    prompt = Prompt(tiny_tokenizer(), qpeft.QPeftConfig(template="upr", max_document_tokens=4))
    clue = prompt.tokenizer("*", add_special_tokens=False)["input_ids"]
    ids = [*prompt.documents(["seaside"])[0].ids, *prompt.suffix.hints, *clue, *prompt.suffix.question,
           *prompt.queries(["why?"])[0]]  # fmt: skip
    assert prompt.tokenizer.decode(ids) == f"<s>Passage: sea hints:*. {INSTRUCTION} why?"
    model = qpeft.get_qpeft_model(tiny_lm("llama"), qpeft.QPeftConfig(clues="top_k", rank=8, template="upr"),
                                  tiny_tokenizer())  # fmt: skip
    first, plain = (model.score(PAIRS, path=path).mean_query_log_likelihood for path in ("document_first", "plain"))
    torch.testing.assert_close(first, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options, message", [
    ({"template": "urp"}, "a file of Jinja2, got 'urp'; did you mean 'upr'?"),
    ({"template": "upr", "instruction": "Ask."}, "template='upr' has an instruction of its own; leave instruction out"),
])  # fmt: skip
def test_impossible_templates_are_errors(options, message):
    with pytest.raises(ValueError, match="^QPeftConfig: ") as error:
        qpeft.QPeftConfig(**options)
    assert message in str(error.value)


# -- the command line ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    write_folder(folder / "data")
    save_lm(folder / "t5", family="t5")
    tiny_tokenizer("$A </s>").save_pretrained(folder / "t5")
    save_lm(folder / "llama")
    return folder


def rerank(job, output, *options) -> int:
    return main(["rerank", "--data", str(job / "data"), "--run", str(job / "data" / "run.trec"), "--device", "cpu",
                 "--output", str(output), *map(str, options)])  # fmt: skip


@pytest.mark.parametrize("template", ["qpeft", "upr"])
def test_upr_with_a_t5(job, tmp_path, template, capsys):
    assert rerank(job, tmp_path / "out.trec", "--base-model", job / "t5", "--upr", "--template", template,
                  "--max-memory", 256 << 20) == 0, capsys.readouterr().err  # fmt: skip
    model = qpeft.get_qpeft_model(qpeft.load_lm(job / "t5"), qpeft.QPeftConfig(clues="none", template=template))
    reranker, corpus = qpeft.Reranker(model), formats.Corpus(job / "data")
    for query_id, ranking in formats.read_run(tmp_path / "out.trec").items():
        ids = [doc_id for doc_id, _ in RUN[query_id]]
        expected = reranker.rank(ASKED[query_id], [corpus[doc_id] for doc_id in ids])
        assert [doc_id for doc_id, _ in ranking] == [ids[row["corpus_id"]] for row in expected]
        assert [s for _, s in ranking] == pytest.approx([row["score"] for row in expected], abs=1e-4)


def test_an_adapter_of_a_t5_is_trained_and_reranks(job, tmp_path, capsys):
    train = ["train", "--base-model", job / "t5", "--output", tmp_path / "adapter", "--data", job / "data", "--device",
             "cpu", "--clues", "attention", "--num-heads", 4, "--rank", 8, "--max-steps", 3, "--cache-bytes", 1 << 20,
             "--option", "template=upr"]  # fmt: skip
    assert main([*map(str, train)]) == 0, capsys.readouterr().err
    assert qpeft.QPeftConfig.from_pretrained(tmp_path / "adapter").template == "upr"
    assert rerank(job, tmp_path / "out.trec", "--model", tmp_path / "adapter", "--upr", "--similarity-only",
                  "--cache-bytes", 1 << 20) == 0, capsys.readouterr().err  # fmt: skip
    assert sum(map(len, formats.read_run(tmp_path / "out.trec").values())) == 9
    assert rerank(job, tmp_path / "b.trec", "--model", tmp_path / "adapter", "--template", "qpeft") == 2
    assert "the adapter was trained with template 'upr', got 'qpeft'; leave --template out" in capsys.readouterr().err
    assert rerank(job, tmp_path / "b.trec", "--base-model", job / "t5", "--upr", "--template", "urp") == 2
    assert "did you mean 'upr'?" in capsys.readouterr().err


def test_prefixes_of_an_encoder_decoder_are_not_indexed(job, tmp_path, capsys):
    assert main(["index", str(job / "data"), "--out", str(tmp_path / "index"), "--base-model", str(job / "t5")]) == 2
    assert capsys.readouterr().err == (
        "qpeft index: error: an index is of no use to this model: an encoder–decoder LM has no keys and values of a "
        "document alone: its encoder reads in both directions\n"
    )
    assert not (tmp_path / "index").exists()
    assert main(["index", str(job / "data"), "--out", str(tmp_path / "index"), "--base-model", str(job / "llama")]) == 0
    model = qpeft.get_qpeft_model(qpeft.load_lm(job / "t5"), qpeft.QPeftConfig(clues="none"))
    with pytest.raises(ValueError, match="^Reranker: an index is of no use to this model: an encoder–decoder"):
        qpeft.Reranker(model, cache=qpeft.DocumentCache(0, index=tmp_path / "index"))


def test_an_adapter_of_another_kind_of_lm_is_refused(job, tmp_path):
    model = qpeft.get_qpeft_model(qpeft.load_lm(job / "t5"), qpeft.QPeftConfig(clues="top_k", rank=8))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="was trained on an LM with model_type t5, this one has llama"):
        qpeft.Reranker.from_pretrained(tmp_path / "adapter", job / "llama")


def test_the_best_document_is_found_after_training_on_it(job):
    """The clue module of a T5 learns through its encoder."""
    model = qpeft.get_qpeft_model(tiny_lm("t5"), qpeft.QPeftConfig(clues="top_k", rank=8, k=4), tiny_tokenizer())
    examples = [{"query": QUERIES[0], "positives": [DOCUMENTS[1]], "negatives": [DOCUMENTS[3]]}]
    from transformers import TrainingArguments

    arguments = TrainingArguments(str(job / "run"), per_device_train_batch_size=4, num_train_epochs=25,
                                  learning_rate=2e-2, save_strategy="no", use_cpu=True, report_to="none")  # fmt: skip
    trainer = qpeft.QPeftTrainer(model=model, args=arguments, train_dataset=examples * 4, eval_dataset=examples)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.1
