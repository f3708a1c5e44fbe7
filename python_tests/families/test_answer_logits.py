"""Answers behind a prompt: the logits of a few tokens at its last position, against the LM's own forward."""

import math
from dataclasses import replace

import pytest
import torch
from families.tiny import PAIRS, tiny_lm, tiny_tokenizer

from qpeft_ext import QPeftConfig, get_qpeft_model
from qpeft_ext.engine.answers import Answer, Grades
from qpeft_ext.engine.factory import make_engine

ASKED, TOKENS = (60, 61), (70, 71, 72)
FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "gpt2", "cohere", "granite", "opt", "mamba")  # caps, scales, biases


@pytest.mark.parametrize(("yes", "no", "score"), [
    ((0,), (1,), 2.0 - 1.5),
    ((0,), (), 2.0),
    ((0, 1), (2,), math.log(math.exp(2.0) + math.exp(1.5)) + 1.0),
    ((0,), (1, 2), 2.0 - math.log(math.exp(1.5) + math.exp(-1.0))),
])  # fmt: skip
def test_score_of_an_answer(yes, no, score):
    answer = Answer(yes, no)
    logits = torch.tensor([[2.0, 1.5, -1.0]])[:, answer.token_ids(torch.device("cpu"))]
    torch.testing.assert_close(answer.score(logits), torch.tensor([score]))


def test_an_expected_grade():
    grades = Grades(((0,), (1, 2), (3,)))
    assert grades.token_ids(torch.device("cpu")).tolist() == [0, 1, 2, 3]
    zero, one, two = math.exp(2.0), math.exp(1.5) + math.exp(-1.0), math.exp(0.5)
    expected = (one + 2 * two) / (zero + one + two)
    torch.testing.assert_close(grades.score(torch.tensor([[2.0, 1.5, -1.0, 0.5]])), torch.tensor([expected]))


def log_odds(logits: torch.Tensor, answer: Answer) -> torch.Tensor:
    """What an answer means: log p(any token of yes) − log p(any of no), of logits [V]."""
    p = logits.double().softmax(-1)
    return p[list(answer.yes)].sum().log() - p[list(answer.no)].sum().log()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_few_tokens_are_the_lms_own(family):
    model = get_qpeft_model(tiny_lm(family), QPeftConfig(clues="none"), tiny_tokenizer())
    batch, pieces = model.encode(PAIRS), replace(model.prompt.suffix, asked=ASKED)
    own = []
    for q, d in batch.pairs:
        ids = [*batch.documents[d].ids, *pieces.bare_question, *batch.queries[q], *ASKED]
        own.append(model.lm(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float())
    expected = torch.stack(own)[:, TOKENS]
    tokens, counts = torch.tensor(TOKENS), [0] * len(batch)
    with torch.no_grad():
        outputs = model.engine.outputs(model.engine.assemble(batch, pieces, counts, True), None)
        whole = model.engine.head.token_logits(outputs, tokens)
        torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)
        if not model.engine.why_not_cached:
            prefix = model.engine.read_prefixes([document.ids for document in batch.documents])
            rows = model.engine.assemble(batch, pieces, counts, False)
            outputs = model.engine.outputs(rows, None, prefix, torch.tensor([d for _, d in batch.pairs]))
            shared = model.engine.head.token_logits(outputs, tokens)
            torch.testing.assert_close(shared, expected, rtol=1e-5, atol=1e-5)
    answer = Answer(TOKENS[:2], TOKENS[2:])
    odds = torch.stack([log_odds(logits, answer) for logits in own])
    torch.testing.assert_close(answer.score(whole).double(), odds, rtol=1e-4, atol=1e-4)


def test_nothing_of_a_query_is_a_target():
    model = get_qpeft_model(tiny_lm("llama"), QPeftConfig(clues="none"), tiny_tokenizer())
    batch, pieces = model.encode(PAIRS), replace(model.prompt.suffix, asked=ASKED)
    rows = model.engine.assemble(batch, pieces, [0] * len(batch), with_prefix=False)
    assert rows.target_ids.numel() == 0
    lengths = [len(pieces.bare_question) + len(batch.queries[q]) + len(ASKED) for q, _ in batch.pairs]
    assert rows.mask.sum(1).tolist() == lengths
    assert rows.read.slots.tolist() == [i * rows.ids.shape[1] + n - 1 for i, n in enumerate(lengths)]
    assert rows.ids.flatten()[rows.read.slots].tolist() == [ASKED[-1]] * len(PAIRS)


def test_biases_of_the_head_and_of_the_lm_are_added():
    lm = tiny_lm("bart")
    head = torch.nn.Linear(32, 260)
    head.weight = lm.get_output_embeddings().weight
    lm.set_output_embeddings(head)
    engine = make_engine(lm)
    assert engine.head.fused
    torch.testing.assert_close(engine.head.bias, lm.final_logits_bias[0] + head.bias)
