"""An LM whose head has fewer rows than its table (those of images, in Llama 3.2 Vision): such tokens are only read."""

import pytest
import torch
from families.tiny import tiny_lm, tiny_tokenizer
from torch import nn

import qpeft_ext as qpeft

ROWS = 258  # of the head; the table has 260
MATCH = (
    r"the query 'a <ball>' has the token '<ball>' with the id 258, which the LM reads and cannot score: its head has "
    r"258 rows; leave the token out, or give the head a row for it \(lm.resize_token_embeddings\)"
)


def small_head_lm():
    lm = tiny_lm("llama")
    head = nn.Linear(lm.config.hidden_size, ROWS, bias=False)
    head.weight.data.copy_(lm.get_output_embeddings().weight[:ROWS])
    lm.set_output_embeddings(head)
    lm.config.vocab_size = ROWS
    return lm


def tokenizer(*words):
    tokens = tiny_tokenizer()
    tokens.add_tokens(["<ball>", *words])
    assert tokens.convert_tokens_to_ids("<ball>") == ROWS
    return tokens


def test_a_query_with_a_token_that_the_head_does_not_score():
    model = qpeft.get_qpeft_model(small_head_lm(), qpeft.QPeftConfig(clues="none"), tokenizer())
    reranker = qpeft.Reranker(model)
    with pytest.raises(ValueError, match=MATCH):
        reranker.rank("a <ball>", ["a text"])
    with pytest.raises(ValueError, match=MATCH):
        model.score([("a <ball>", "a text")])
    row = reranker.rank("a query", ["a <ball>"])[0]  # a document is only read
    ids = [*model.prompt.documents(["a <ball>"])[0].ids, *model.prompt.suffix.bare_question]
    query = model.prompt.queries(["a query"])[0]
    with torch.no_grad():
        logits = model.lm(input_ids=torch.tensor([[*ids, *query]])).logits[0, len(ids) - 1 : -1]
    own = logits.log_softmax(-1).gather(-1, torch.tensor(query)[:, None]).sum()
    assert row["score"] == pytest.approx(float(own), abs=1e-3)


def test_what_is_only_read_may_have_the_token():
    config = qpeft.QPeftConfig(clues="none", score="yes_no", yes_words=("a",), no_words=("b",))
    model = qpeft.get_qpeft_model(small_head_lm(), config, tokenizer())
    assert torch.isfinite(torch.tensor(qpeft.Reranker(model).predict([("a <ball>", "a text")]))).all()
    with pytest.raises(ValueError, match="the prompt's template has the token '<ball>' .* cannot score"):
        qpeft.get_qpeft_model(
            small_head_lm(),
            qpeft.QPeftConfig(clues="none", score="yes_no", yes_words=("<ball>",), no_words=("b",)),
            tokenizer(),
        )


def test_a_resized_head_scores_it():
    lm = small_head_lm()
    lm.resize_token_embeddings(260, mean_resizing=False)
    model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="none"), tokenizer())
    assert torch.isfinite(model.score([("a <ball>", "a text")]).query_log_likelihood).all()
