"""Scores and gradients of small requests through the public API, most sizes 1: the kernels against both oracles.

Document-first with the kernels, the plain path, and document-first with the PyTorch definitions must agree.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))

from families.tiny import tiny_lm, tiny_tokenizer
from fuzz.runner import run

import qpeft_ext as qpeft
from qpeft_ext.ops import _library

FILTERS = ("query_tokens", "stop_words", "non_alphabetic")
ONE_ROW = 2 * 32 * 4  # bytes of a projected row
CONFIGS = [
    {"clues": "none"},
    {"clues": "attention", "num_heads": 4, "rank": None, "attention_bias": True},
]
for filters in ((), FILTERS):
    CONFIGS += [{"clues": "attention", "num_heads": heads, "filters": filters} for heads in (1, 4, 32)]
    CONFIGS += [{"clues": "top_k", "k": k, "filters": filters} for k in (1, 3)]

letters = st.sampled_from(["a", "b", " ", "1"])  # one token each
queries = st.one_of(st.just("a"), st.text(letters, min_size=1, max_size=3).filter(str.strip))
documents = st.one_of(st.just(""), st.just("b"), st.just("bbb"), st.text(letters, max_size=4))
pairs = st.lists(st.tuples(queries, documents), min_size=1, max_size=3)


@cache
def model_of(number: int) -> qpeft.QPeftModel:
    """A model whose clue module has left the identity, as after training."""
    model = qpeft.get_qpeft_model(tiny_lm("llama", num_hidden_layers=1),
                                  qpeft.QPeftConfig(**{"rank": 4, **CONFIGS[number]}), tiny_tokenizer())  # fmt: skip
    torch.manual_seed(1)
    for parameter in model.clues.parameters() if model.clues else ():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


@contextmanager
def definitions():
    """Inside, the PyTorch definitions of the operators run, as with QPEFT_REFERENCE=1."""
    live, noticed = set(_library._live), set(_library._noticed)
    _library._live.clear()
    _library._noticed.add("cpu")
    try:
        yield
    finally:
        _library._live.update(live)
        _library._noticed.intersection_update(noticed)


def gradients(model, pairs) -> list[torch.Tensor]:
    model.zero_grad()
    scores = model.train()(model.encode(pairs)).mean_query_log_likelihood
    if not scores.requires_grad:
        return []
    scores.sum().backward()
    model.eval()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@example(2, [("a", "b")], None)  # one token each
@example(2, [("ab", "bbb"), ("ab", "aa")], 0)  # documents of one distinct token
@given(st.integers(0, len(CONFIGS) - 1), pairs, st.sampled_from([None, 0, ONE_ROW, 3 * ONE_ROW]))
def small_requests(number, pairs, projected_bytes):
    model = model_of(number)
    ours = qpeft.Reranker(model, projected_bytes=projected_bytes).predict(pairs)
    plain = qpeft.Reranker(model, projected_bytes=0, path="plain").predict(pairs)
    with definitions():
        truth = qpeft.Reranker(model, projected_bytes=projected_bytes).predict(pairs)
        true_gradients = gradients(model, pairs)
    np.testing.assert_allclose(ours, truth, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)
    candidates = [document for _, document in pairs]
    ranked = qpeft.Reranker(model, projected_bytes=projected_bytes).rank(pairs[0][0], candidates)
    assert [row["score"] for row in ranked] == sorted((row["score"] for row in ranked), reverse=True)
    if model.clues:
        our_gradients = gradients(model, pairs)
        largest = max((float(g.norm()) for g in true_gradients), default=0.0)
        assert len(our_gradients) == len(true_gradients)
        for a, b in zip(our_gradients, true_gradients, strict=True):
            assert float((a - b).norm()) <= 1e-5 * max(largest, 1)


if __name__ == "__main__":
    run(small_requests)
