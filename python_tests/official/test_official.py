"""`compat="official"` against an independent restatement of the official code: scores, gradients, choice of clues."""

from __future__ import annotations

import pytest
import torch
from families.tiny_llama import tiny_llama, tiny_llama_tokenizer
from official.models import (
    DOCUMENTS,
    LETTERS,
    PAIRS,
    QUERIES,
    clue_ids,
    expected_ids,
    official_model,
    restated,
    text_of,
)

import qpeft_ext as qpeft
from qpeft_ext.official.clues import allowed_pieces

pytestmark = pytest.mark.slow


# -- scores and gradients ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["document_first", "clues_first"])
@pytest.mark.parametrize("options", [
    {"clues": "top_k"},
    {"clues": "top_k", "similarity": "dot", "filters": ("query_tokens", "stop_words", "non_alphabetic"), "k": 7},
    {"clues": "top_k", "max_document_tokens": 20},
    {"clues": "attention"},
    {"clues": "attention", "filters": ("query_tokens", "stop_words", "non_alphabetic"), "max_document_tokens": 20},
], ids=str)  # fmt: skip
def test_scores_and_gradients_are_those_of_the_restatement(options, layout):
    model = official_model(layout=layout, **options).train()
    oracle, weights = restated(model), torch.linspace(-1, 1, len(PAIRS))
    assert bool(model.engine.why_not_cached) == (layout == "clues_first")
    expected = [oracle.score(query, text_of(document)) for query, document in PAIRS]
    means, sums = (torch.stack(column) for column in zip(*expected, strict=True))
    (means * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.clues.named_parameters()}
    assert all(gradient.norm() > 0 for gradient in gradients.values())
    largest = max(float(gradient.norm()) for gradient in gradients.values())
    for path in ("plain", "document_first"):
        model.zero_grad()
        scores = model(model.encode(PAIRS), path=path)
        torch.testing.assert_close(scores.mean_query_log_likelihood, means, rtol=0, atol=1e-5)
        torch.testing.assert_close(scores.query_log_likelihood, sums, rtol=1e-5, atol=1e-5)
        (scores.mean_query_log_likelihood * weights).sum().backward()
        for name, parameter in model.clues.named_parameters():
            assert float((parameter.grad - gradients[name]).norm()) <= 1e-5 * largest, name
    assert scores.num_tokens.tolist() == [len(oracle.ids(query)) + 2 for query, _ in PAIRS]
    assert means.std() > 0.05  # otherwise a wrong document could not be seen


def test_without_clues_it_is_the_official_prompt_alone():
    model = official_model("none")
    oracle = restated(model)
    for (query, document), score in zip(PAIRS, model.score(PAIRS).query_log_likelihood, strict=True):
        assert float(score) == pytest.approx(float(oracle.score(query, text_of(document))[1]), abs=1e-4)


def test_the_prompt_reads_as_the_official_one():
    model = official_model()
    (prefix,), (query,) = model.prompt.documents([DOCUMENTS[1]]), model.prompt.queries([QUERIES[1]])
    text = model.tokenizer.decode
    question, soft = model.prompt.suffix.question, model.qpeft_config.instruction
    assert soft == "given the hints, please generate a question for the input passage"
    assert text(prefix.ids) == f"<s> {soft} Passage: {text_of(DOCUMENTS[1])} \n"
    assert text(question) == "Question: \n" and text(model.prompt.suffix.scored(query)) == "<s> boats</s>"
    assert text(model.clues.hints.tolist()) == "hints: " and text(model.clues.newline.tolist()) == "\n"


@pytest.mark.parametrize("limit", [5, 6, 12, 47, 48, 300])
def test_the_head_of_a_long_document_is_cut(limit):
    model = official_model(max_document_tokens=limit)
    expected, whole = (restated(m).document_part(DOCUMENTS[0]) for m in (model, official_model()))
    prefix = model.prompt.documents([DOCUMENTS[0]])[0]
    assert [*prefix.document_ids, *model.prompt.suffix.question] == expected
    assert prefix.cut == len(whole) - len(expected) == max(0, len(whole) - limit)
    assert prefix.ids[: prefix.start] == (1, *restated(model).ids(model.qpeft_config.instruction))


# -- the choice of clues -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("letters", ["", "q", "s", "a", "qsa"])
def test_the_clues_are_those_of_the_restatement(letters, similarity):
    filters = tuple(LETTERS[letter] for letter in letters)
    for moved in (True, False):  # not moved: all document tokens that stand in the query are as similar as can be
        model = official_model(filters=filters, similarity=similarity, moved=moved, k=8)
        for query, document in PAIRS:
            assert clue_ids(model, query, document) == expected_ids(model, query, document)


def test_all_that_could_be_clues_are_in_order():
    """Those that are unlike every query token too, before the query's own."""
    model = official_model()
    oracle = restated(model)
    for query, document in [("boats", "sea"), ("the", "dull"), *PAIRS]:
        expected = oracle.survivors(oracle.ids(query), oracle.document_part(text_of(document)))
        model.clues.k = len(expected)
        assert clue_ids(model, query, document) == expected


def test_pairs_together_have_the_clues_of_pairs_alone():
    model = official_model(k=8)
    found = model.compute_clues(model.encode(PAIRS), explain=True).explanation["clue_ids"]
    for row, (query, document) in zip(found, PAIRS, strict=True):
        assert row[row >= 0].tolist() == clue_ids(model, query, document)
    together, alone = (model.score(PAIRS, deterministic=flag).query_log_likelihood for flag in (False, True))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)
    assert torch.equal(alone, torch.cat([model.score([p], deterministic=True).query_log_likelihood for p in PAIRS]))


def test_words_of_the_template_become_clues():
    model = official_model(k=10)
    pieces = {
        piece
        for query, document in PAIRS
        for piece in model.tokenizer.convert_ids_to_tokens(clue_ids(model, query, document))
    }
    assert pieces & {"▁Pass", "age", "▁Question", ":"}


def test_the_query_leaks_into_the_clues_of_a_short_document():
    query, document = QUERIES[0], "sea"
    model = official_model(k=15)
    chosen = clue_ids(model, query, document)
    assert chosen == expected_ids(model, query, document)
    part = restated(model).document_part(document)
    leaked = [token for token in chosen if token not in part]
    asked = list(model.prompt.queries([query])[0])
    assert leaked and leaked == list(dict.fromkeys(t for t in asked if t not in part))[: len(leaked)]
    default = qpeft.get_qpeft_model(tiny_llama(), qpeft.QPeftConfig(clues="top_k", k=15), tiny_llama_tokenizer())
    batch = default.encode([(query, document)])
    ids = default.compute_clues(batch, explain=True).explanation["clue_ids"][0]
    assert set(ids[ids >= 0].tolist()) == set(batch.documents[0].document_ids)  # "▁sea": one clue, and no query token


def test_only_the_best_thousand_are_looked_at():
    """A long query and document: 1000 of the pairs (query token, position) are all there is to choose from."""
    query, document = " ".join(QUERIES * 3), " ".join(text_of(d) for d in DOCUMENTS)
    model = official_model(max_query_tokens=100)
    oracle = restated(model)
    asked, part = oracle.ids(query), oracle.document_part(document)
    expected = oracle.survivors(asked, part)
    assert len(asked) * len(part) > 3000 and 10 < len(expected) < len({*asked, *part})
    model.clues.k = len(expected)
    assert clue_ids(model, query, document) == expected
    model.clues.k += 1
    with pytest.raises(ValueError, match="at random"):
        clue_ids(model, query, document)


def test_without_survivors_no_filter_is_in_force():
    query = "Passage: Question: \n sea"
    model = official_model(k=9, filters=("query_tokens",))
    chosen = clue_ids(model, query, "sea")
    assert chosen == expected_ids(model, query, "sea")
    asked = model.prompt.queries([query])[0]
    assert set(chosen) <= set(asked) and len(set(chosen)) < 9  # the filter would leave none; tokens repeat
    long = official_model(k=90, filters=("query_tokens",))  # more than there are of the document: without <s> and </s>
    assert clue_ids(long, query, "sea") == expected_ids(long, query, "sea")


def test_filters_have_their_faults():
    tokenizer = tiny_llama_tokenizer()

    def passing(*names: str) -> list[str]:
        pieces = ["▁the", "the", "▁is", "▁moon", "<0x0A>", "2", "▁", ",", "_", "<s>", "</s>", "<unk>"]
        allowed = allowed_pieces(tokenizer, len(tokenizer) + 3, names)
        return [piece for piece in pieces if allowed[tokenizer.convert_tokens_to_ids(piece)]]

    everything = ["▁the", "the", "▁is", "▁moon", "<0x0A>", "2", "▁", ",", "_", "<unk>"]
    assert passing() == everything
    assert passing("stop_words") == [piece for piece in everything if piece != "the"]
    assert passing("non_alphabetic") == ["▁the", "the", "▁is", "▁moon", "<0x0A>", "<unk>"]


def test_attention_equals_multihead_attention_over_what_is_left():
    model = official_model("attention", filters=("query_tokens", "non_alphabetic"))
    oracle = restated(model)
    batch = model.encode(PAIRS)
    with torch.no_grad():
        found = model.compute_clues(batch, explain=True)
        for i, (query, document) in enumerate(PAIRS):
            part, asked = oracle.document_part(text_of(document)), oracle.ids(query)
            expected = torch.stack(oracle.hint_vectors(asked, part))
            torch.testing.assert_close(found.embeds[i][found.mask[i]], expected, rtol=1e-5, atol=1e-5)
            read = found.explanation["weights"][i].sum((0, 1)) > 0
            seen = [not oracle.is_filtered(token, asked, "qa") for token in part]
            length = len(part) - 4  # then padding, then "Question: \n"
            assert read[:length].tolist() == seen[:length] and read[-4:].tolist() == seen[-4:]
