"""A tiny reranker, and a stub of a server."""

import pytest
from families.tiny import tiny_lm, tiny_tokenizer
from stub_server import serving

import qpeft_ext as qpeft


@pytest.fixture(scope="session")
def reranker():
    config = qpeft.QPeftConfig(clues="top_k", k=3, rank=8)
    return qpeft.Reranker(qpeft.get_qpeft_model(tiny_lm("llama"), config, tiny_tokenizer()), deterministic=True)


@pytest.fixture
def stub():
    with serving() as stub:
        yield stub
