"""Instructions of single queries: between document and query, not scored, and without effect on cached documents."""

import pytest
import torch
from families.tiny import DOCUMENTS, QUERIES, tiny_lm, tiny_tokenizer

import qpeft_ext as qpeft
from qpeft_ext.prompts.prompt import document_text

WANTED = "Find a passage that disagrees."


def reranker_of(cache=None, family="llama", **options) -> qpeft.Reranker:
    config = qpeft.QPeftConfig(**{"clues": "none"} | options)
    return qpeft.Reranker(qpeft.get_qpeft_model(tiny_lm(family), config, tiny_tokenizer()), cache=cache)


@torch.no_grad()
def plain_score(lm, before: str, query: str) -> float:
    """Σ log p of a query behind a text, of an LM whose tokens are bytes, in float64."""
    tokenizer = tiny_tokenizer()
    given, scored = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, query))
    logits = lm.double()(input_ids=torch.tensor([[0, *given, *scored]]), use_cache=False).logits[0]
    log_p = logits.log_softmax(-1)[-len(scored) - 1 : -1]
    return float(log_p[range(len(scored)), scored].sum())


def test_the_lm_reads_it_between_document_and_query():
    reranker = reranker_of()
    found = reranker.predict([(QUERIES[0], document) for document in DOCUMENTS], instruction=f" {WANTED}\n")
    for document, score in zip(DOCUMENTS, found, strict=True):
        text = f" {document_text(document)}" if document_text(document) else ""
        before = f"Please write a question for the passage. Passage:{text}\nInstruction: {WANTED}\nQuestion:"
        assert score == pytest.approx(plain_score(tiny_lm("llama"), before, f" {QUERIES[0]}"), abs=2e-4)


def test_it_stands_behind_the_clues():
    prompt = reranker_of(clues="top_k", k=2).model.prompt
    pieces = prompt.instructed(WANTED)
    assert prompt.tokenizer.decode(pieces.question) == f"\nInstruction: {WANTED}\nQuestion:"
    assert prompt.tokenizer.decode(pieces.bare_question) == f"Instruction: {WANTED}\nQuestion:"
    assert pieces.hints == prompt.suffix.hints
    first = reranker_of(clues="top_k", k=2, layout="clues_first").model.prompt.instructed(WANTED)
    assert prompt.tokenizer.decode(first.question) == f"Instruction: {WANTED}\nQuestion:"


@pytest.mark.parametrize("clues", ["top_k", "attention"])
def test_queries_with_and_without_share_a_call(clues):
    reranker = reranker_of(clues=clues, k=2, num_heads=4, rank=8)
    queries, instructions = [QUERIES[0], *QUERIES], [WANTED, None, "In brief."]
    together = reranker.rank_many(queries, [DOCUMENTS] * 3, instruction=instructions)
    for query, instruction, rows in zip(queries, instructions, together, strict=True):
        alone = reranker.rank(query, DOCUMENTS, instruction=instruction)
        assert [row["corpus_id"] for row in rows] == [row["corpus_id"] for row in alone]
        assert [row["score"] for row in rows] == pytest.approx([row["score"] for row in alone], abs=1e-4)
    assert abs(together[0][0]["score"] - together[1][0]["score"]) > 0.01
    pairs = [(query, DOCUMENTS[1]) for query in queries]
    by_pair = reranker.predict(pairs, instruction=instructions)
    of_document_1 = [row["score"] for rows in together for row in rows if row["corpus_id"] == 1]
    assert by_pair.tolist() == pytest.approx(of_document_1, abs=1e-4)


def test_cached_documents_stay_valid():
    cache = qpeft.DocumentCache(1 << 20)
    reranker = reranker_of(cache)
    reranker.rank(QUERIES[0], DOCUMENTS)
    assert cache.misses == len(DOCUMENTS)
    reranker.rank(QUERIES[0], DOCUMENTS, instruction=WANTED)
    assert cache.misses == len(DOCUMENTS)


def test_none_gives_the_ids_of_a_prompt_without():
    model = reranker_of().model
    pairs = [(query, DOCUMENTS[0]) for query in QUERIES]
    assert model.encode(pairs, instructions=[None, None]) == model.encode(pairs)


@pytest.mark.parametrize(("options", "reason"), [
    ({"template": "upr"}, "template='upr' is a fixed text"),
    ({"family": "t5"}, "the encoder of an encoder–decoder LM would read it"),
])  # fmt: skip
def test_a_prompt_without_a_place_for_it_says_so(options, reason):
    with pytest.raises(ValueError, match=f"^instruction: {reason}.*; leave instruction out$"):
        reranker_of(**options).rank(QUERIES[0], DOCUMENTS, instruction=WANTED)


@pytest.mark.parametrize(("instruction", "error", "reason"), [
    (3, TypeError, "rank_many: instruction"),
    ([WANTED], ValueError, "instruction must be a string, or a list of 2, got 1"),
    ([WANTED, 3], TypeError, "instruction must be a string"),
    (" ", ValueError, "at least one token"),
    ("x" * 300, ValueError, "at most 256 tokens, got 30[01]"),
])  # fmt: skip
def test_wrong_instructions_are_named(instruction, error, reason):
    with pytest.raises(error, match=reason):
        reranker_of().rank_many(QUERIES, [DOCUMENTS] * 2, instruction=instruction)
