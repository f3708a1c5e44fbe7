"""Explanations: what each kind of clue says, and that its places are places in the user's own document."""

from __future__ import annotations

import pytest
import torch
from families.tiny import tiny_lm, tiny_tokenizer

import qpeft_ext as qpeft

QUERY = "tidal"
DOCUMENT = {"id": "d", "title": "Tides", "text": "  the tide rises twice a day; naïve 潮 tide"}


def reranker(**options) -> qpeft.Reranker:
    config = qpeft.QPeftConfig(**{"num_heads": 4, "rank": 8, "k": 4} | options)
    return qpeft.Reranker(qpeft.get_qpeft_model(tiny_lm("llama"), config, tiny_tokenizer()))


@pytest.mark.parametrize("document", [DOCUMENT, dict(DOCUMENT, title=""), dict(DOCUMENT, title="  A title "),
                                      "\n " + DOCUMENT["text"], DOCUMENT["text"].strip()])  # fmt: skip
@pytest.mark.parametrize("clues", ["top_k", "attention"])
def test_places_are_places_in_the_given_document(clues, document):
    explanation = reranker(clues=clues).explain(QUERY, document)
    own = document if isinstance(document, str) else document["text"]
    title = "" if isinstance(document, str) else document["title"]
    in_title = 0
    assert explanation.clues
    for span in explanation.clues:
        assert explanation.text[span.start : span.end] == span.token
        place = explanation.place_in_document(span)
        in_title += place is None
        assert place is None or own[slice(*place)] == span.token
    # "Tides", "A title" hold letters of the query, and attention looks at everything
    assert bool(in_title) == bool(title.strip())


def test_attention_by_head_and_token():
    found = reranker(clues="attention").explain(QUERY, DOCUMENT)
    attention = found.attention
    tokens = len(attention.query_tokens)
    assert attention.query_tokens[1:] == list(QUERY) and not found.tokens  # the first is the space before it
    assert attention.weights.shape == (4, tokens, len(attention.spans)) and tokens == 6
    torch.testing.assert_close(attention.weights.sum(-1), torch.ones(4, tokens))
    mean = attention.weights.mean((0, 1))
    for span in found.clues:
        places = [s for s, place in enumerate(attention.spans) if place == (span.start, span.end)]
        assert span.weight in [pytest.approx(float(mean[s])) for s in places]


def test_tokens_of_top_k_with_their_scores_and_gates():
    plain = reranker(clues="top_k").explain(QUERY, DOCUMENT)
    assert len(plain.tokens) == 4 and plain.attention is None
    assert [token.weight for token in plain.tokens] == sorted((t.weight for t in plain.tokens), reverse=True)
    assert all(token.gate == 1 and token.query_token == token.token for token in plain.tokens)  # cosine 1: the same
    assert {span.token.strip() for span in plain.clues} == {token.token for token in plain.tokens}
    gated = reranker(clues="top_k", score_gate=True, similarity="dot").explain(QUERY, DOCUMENT)
    gates = [token.gate for token in gated.tokens]
    assert gates == sorted(gates, reverse=True) and gates[0] > 1 > gates[-1]  # larger scores, larger gates


def test_expansion_has_tokens_but_no_place():
    model = reranker(clues="top_k", source="vocabulary", filters=("query_tokens",))
    found = model.explain(QUERY, "tidal")
    assert len(found.tokens) == 4 and not found.clues
    everything = reranker(clues="top_k", source="vocabulary", k=6).explain(QUERY, "tidal")
    assert {span.token for span in everything.clues} == set(QUERY)


def test_a_random_choice_names_no_query_token():
    found = reranker(clues="top_k", selection="random").explain(QUERY, DOCUMENT)
    assert len(found.tokens) == 4 and {(t.weight, t.query_token) for t in found.tokens} == {(1.0, "")}


def test_candidates_explain_the_list():
    model = reranker(clues="top_k", source="candidates", k=5)
    documents = ["ti xyz", "da q", "al i"]
    found = model.explain(QUERY, "da q", documents)
    assert {token.token for token in found.tokens} <= set(QUERY) | {""}
    assert {span.token for span in found.clues} == {t.token or " " for t in found.tokens} & set("da q")
    assert len(model.explain(QUERY, "da q").tokens) == 4  # of this document alone: d, a, q and the space
    with pytest.raises(ValueError, match="must be one of the candidates, got 'other'"):
        model.explain(QUERY, "other", documents)


def test_an_empty_document_has_nothing_to_explain():
    for clues in ("top_k", "attention", "none"):
        found = reranker(clues=clues).explain(QUERY, "")
        assert found.clues == [] and found.tokens == [] and found.attention is None
