"""Rotary tables that depend on the longest prompt of a pass: every prompt is read with that of its own length."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from test_families import assert_same, scores_and_gradients, trained_model
from tiny import own_scores, tiny_lm

import qpeft_ext as qpeft
from qpeft_ext.lm.rope import find_rotary_tables

pytestmark = pytest.mark.slow

QUERY = "why tides?"
DOCUMENTS = ["a sea", "the moon pulls the sea twice a day", "boats in a harbour, " * 4, "tides rise and fall, " * 3]
PAIRS = [(query, document) for query in (QUERY, "boats") for document in DOCUMENTS]
_LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0, 4.0, 6.0, 8.0]}


def prompt_lengths(model, pairs=PAIRS) -> list[int]:
    return [len(model.prompt.documents([document])[0].ids) + len(model.prompt.suffix.bare_question)
            + len(model.prompt.queries([query])[0]) for query, document in pairs]  # fmt: skip


def longrope(limit: int):
    return tiny_lm("phi3", sliding_window=None, original_max_position_embeddings=limit,
                   rope_parameters=_LONGROPE | {"original_max_position_embeddings": limit})  # fmt: skip


def dynamic(limit: int):
    """Scaling that begins at ``limit``, within the context."""
    lm = tiny_lm(
        "llama",
        max_position_embeddings=limit,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    )
    lm.model.rotary_emb.config = copy.deepcopy(lm.config)
    lm.config.max_position_embeddings = 512
    return lm


def model_of(lm, clues: str = "none") -> qpeft.QPeftModel:
    return trained_model(lm, clues)


def own_scores_by_length(model) -> torch.Tensor:
    """Scores of the pairs, each read as by an LM just loaded ("dynamic" scaling keeps the longest prompt's table)."""
    scores = []
    for pair in PAIRS:
        with torch.no_grad():
            model.lm(input_ids=torch.tensor([[0]]))
        scores.append(own_scores(model, [pair]))
    return torch.cat(scores)


@pytest.mark.parametrize("make", [longrope, dynamic])
def test_a_prompt_is_read_with_the_table_of_its_own_length(make):
    lengths = sorted(prompt_lengths(model_of(tiny_lm("llama"))))
    for limit in (lengths[3], lengths[3] - 1):  # the first table is for prompts of the limit too
        model, cache = model_of(make(limit)), qpeft.DocumentCache()
        assert model.engine.rotary.limit == limit and model.engine.rotary.one_per_length == (make is dynamic)
        assert not model.engine.why_not_cached and not model.engine.why_unpadded
        expected = own_scores_by_length(model)
        for options in (
            {},
            {"path": "plain"},
            {"cache": cache},
            {"cache": cache},
            {"deterministic": True},
            {"deterministic": True, "cache": qpeft.DocumentCache()},
            {"max_tokens_per_batch": 200},
        ):
            got = model.score(PAIRS, **options).query_log_likelihood
            torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
        assert cache.hits == cache.misses > 0  # a table that a pass puts in place makes no other LM
        assert torch.cat([model.score([pair], deterministic=True).query_log_likelihood for pair in PAIRS]).equal(
            model.score(PAIRS, deterministic=True).query_log_likelihood)  # fmt: skip
        with torch.no_grad():
            model.lm(input_ids=torch.zeros(1, 300, dtype=torch.long))  # which leaves its table behind
        torch.testing.assert_close(model.score(PAIRS).query_log_likelihood, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("clues", ["attention", "top_k"])
def test_clues_count_in_the_length_and_get_their_gradient(clues):
    lengths = sorted(prompt_lengths(model_of(tiny_lm("llama"))))
    for limit in (lengths[0] + 10, lengths[4]):
        model = model_of(longrope(limit), clues)
        alone = torch.cat([model.score([pair], path="plain").query_log_likelihood for pair in PAIRS])
        torch.testing.assert_close(model.score(PAIRS).query_log_likelihood, alone, rtol=0, atol=1e-4)
        assert_same(scores_and_gradients(model, "document_first"), scores_and_gradients(model, "plain"))


def test_a_trained_lora_sees_both_tables():
    lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = model_of(peft.get_peft_model(longrope(60), lora), "attention")
    plain = scores_and_gradients(model, "plain")
    assert_same(scores_and_gradients(model, "document_first"), plain)


def test_tables_that_are_always_the_same_are_not_searched():
    for family in ("llama", "gemma3", "gpt_neox", "gpt2"):
        lm = tiny_lm(family)
        assert find_rotary_tables(lm.get_decoder(), 512).limit is None
    assert find_rotary_tables(longrope(700).get_decoder(), 512).limit is None  # never reached
