"""`QPeftConfig`: the recommended options, and options that exclude each other."""

import doctest

import pytest

import qpeft_ext.config.options
from qpeft_ext import QPeftConfig
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
