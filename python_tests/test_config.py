"""`QPeftConfig`: the recommended options, and options that exclude each other."""

import doctest

import pytest

import qpeft_ext.config.options
from qpeft_ext import QPeftConfig, QPeftModel
from qpeft_ext.config.combinations import CHECKS


def examples(*negatives: int) -> list[dict]:
    return [{"query": "q", "positives": ["p"], "negatives": ["n"] * count} for count in negatives]


def test_examples_in_docstrings():
    done = doctest.testmod(qpeft_ext.config.options)
    assert done.attempted and not done.failed


def test_recommended_options_are_those_that_ranked_best():
    config = QPeftConfig.recommended()
    assert config == QPeftConfig(
        clues="top_k", loss="listwise", num_hard_negatives=7, generated_lora_rank=16, target_modules=("all-linear",)
    )
    assert QPeftConfig.recommended(loss="pairwise", generated_lora_rank=4).generated_lora_rank == 4
    assert QPeftConfig.recommended(target_modules="q_proj").target_modules == ("q_proj",)
    with pytest.raises(TypeError):
        QPeftConfig.recommended(klues="top_k")


@pytest.mark.parametrize("option", [
    {"clues": "none"}, {"loss": "pointwise"}, {"compat": "official"}, {"generated_lora_rank": None},
])  # fmt: skip
def test_no_lora_is_recommended_where_it_learns_nothing_from_documents(option):
    config = QPeftConfig.recommended(**option)
    assert config.generated_lora_rank is None
    assert config.target_modules is None


@pytest.mark.parametrize(("negatives", "options", "in_batch"), [
    ([7, 8], {}, False),
    ([7, 6], {}, True),
    ([9], {"num_hard_negatives": 6}, True),
    ([9], {"in_batch_negatives": True}, True),
    ([9], {"loss": "contrastive"}, True),
    ([], {}, True),
])  # fmt: skip
def test_documents_of_other_queries_are_left_out_where_every_query_has_enough_negatives(negatives, options, in_batch):
    assert QPeftConfig.recommended(examples(*negatives), **options).in_batch_negatives is in_batch


def test_defaults_pass_every_check_and_every_message_can_be_written():
    config = QPeftConfig()
    for excluded, message in CHECKS:
        assert not excluded(config)
        assert "NAME" not in message
        assert message.format(c=config)


@pytest.mark.parametrize(("options", "message"), [
    ({"score": "yesno"}, "score must be one of likelihood, yes_no, graded, both, got 'yesno'; did you mean 'yes_no'?"),
    ({"ask": "Relevant?"}, "ask='Relevant?' is of a score that asks for an answer; set score='yes_no', 'graded' or"),
    ({"exact_words": True}, "exact_words=True is of a score that asks for an answer"),
    ({"yes_words": "true"}, "yes_words=('true',) are of score='yes_no' and 'both', got score='likelihood'"),
    ({"score": "graded", "no_words": ("false",)}, "no_words=('false',) are of score='yes_no' and 'both', got score="),
    ({"score": "yes_no", "max_grade": 9}, "max_grade=9 is of score='graded', got score='yes_no'"),
    ({"score": "graded", "max_grade": 0}, "max_grade must be at least 1, got 0"),
    ({"score": "yes_no", "yes_words": ()}, "yes_words must be words, at least one, got ()"),
    ({"score": "yes_no", "yes_words": ("yes", " ")}, "yes_words must be words, at least one, got ('yes', ' ')"),
    ({"score": "yes_no", "yes_words": 1}, "yes_words must be words, got 1"),
    ({"score": "yes_no", "ask": "  "}, "ask must be a text that is not empty; leave it out for the usual one"),
    ({"score": "yes_no", "ask": 3}, "ask must be a text, got 3"),
    ({"score": "yes_no", "compat": "official"}, "compat='official' has score='likelihood' and nothing else"),
])  # fmt: skip
def test_options_of_scores_are_checked(options, message):
    with pytest.raises((ValueError, TypeError)) as error:
        QPeftConfig(**options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_score_that_asks_has_the_listwise_loss():
    assert QPeftConfig().loss == "pointwise_pairwise"
    assert [QPeftConfig(score=score).loss for score in ("yes_no", "graded", "both")] == ["listwise"] * 3
    assert QPeftConfig(score="yes_no", loss="ranknet").loss == "ranknet"
    assert QPeftConfig.from_dict(QPeftConfig(score="both", yes_words=["true", "right"]).to_dict()).yes_words == (
        "true", "right")  # fmt: skip


def test_recommended_options_of_a_rerankers_template_have_no_clues():
    config = QPeftConfig.recommended(template="qwen3_reranker")
    assert (config.clues, config.generated_lora_rank, config.loss, config.score) == ("none", None, "listwise", "yes_no")


def test_the_lm_of_an_adapter_is_the_argument_lm(tmp_path):
    with pytest.raises(TypeError, match="the LM is the argument lm here, got base_model"):
        QPeftModel.from_pretrained(tmp_path, base_model="an LM")
