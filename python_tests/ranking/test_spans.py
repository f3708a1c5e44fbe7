"""Spans: sentences weighed by the LM against a plain forward pass, phrases of clues by hand."""

import numpy as np
import pytest
import torch
from families.tiny import tiny_lm, tiny_tokenizer

import qpeft_ext as qpeft
from qpeft_ext.ranking.explain import AttentionMap, ClueSpan, Explanation
from qpeft_ext.ranking.spans import NATS, best_spans, clue_phrases, weighed

QUERY = "why tides?"
TEXT = "The moon pulls. Boats float!  Tides rise twice."
SENTENCES = ["The moon pulls.", "Boats float!", "Tides rise twice."]
DOCUMENT = {"title": "Sea", "text": TEXT}


def reranker_of(family: str = "llama", passages: str | None = None, **options) -> qpeft.Reranker:
    config = qpeft.QPeftConfig(**{"clues": "none"} | options)
    return qpeft.Reranker(qpeft.get_qpeft_model(tiny_lm(family), config, tiny_tokenizer()), passages=passages)


@pytest.fixture(scope="module")
def reranker() -> qpeft.Reranker:
    return reranker_of()


@torch.no_grad()
def plain_evidence() -> np.ndarray:
    """Log p of the query with each sentence alone, less that without it: whole prompts in float64 with a mask.

    Tokens are bytes. The tokens of the prefix see all that is before them, the others do not see what is hidden.
    """
    lm, tokenizer = tiny_lm("llama").double(), tiny_tokenizer()
    before = f"Please write a question for the passage. Passage: Sea {TEXT}\n"
    ids = [0, *tokenizer(f"{before}Question: {QUERY}", add_special_tokens=False)["input_ids"]]
    P, L, T = 1 + len(before), len(ids), len(QUERY) + 1
    slots = [range(1 + before.index(words), 1 + before.index(words) + len(words)) for words in SENTENCES]
    found = []
    for s, own in enumerate(slots):
        log_p = []
        for hidden in ([i for other in slots[:s] + slots[s + 1 :] for i in other], own):
            seen = torch.ones(L, L, dtype=torch.bool).tril()
            seen[P:, list(hidden)] = False
            mask = torch.zeros(L, L, dtype=torch.float64).masked_fill(~seen, -torch.inf)[None, None]
            logits = lm(input_ids=torch.tensor([ids]), attention_mask=mask, use_cache=False).logits[0].log_softmax(-1)
            log_p.append(float(logits[L - T - 1 : L - 1].gather(-1, torch.tensor(ids[-T:])[:, None]).sum()))
        found.append(log_p[0] - log_p[1])
    return np.array(found)


def test_sentences_have_the_shares_that_a_plain_pass_gives(reranker):
    evidence = plain_evidence()
    expected = np.exp(evidence / NATS) / np.exp(evidence / NATS).sum()
    spans = reranker.spans(QUERY, DOCUMENT, threshold=0)
    assert [span.score for span in spans] == sorted((span.score for span in spans), reverse=True)
    by_text = {span.text: span.score for span in spans}
    assert [by_text[words] for words in SENTENCES] == pytest.approx(expected.tolist(), abs=1e-4)
    assert all(TEXT[span.start : span.end] == span.text for span in spans)


def test_the_document_is_read_once():
    reranker = reranker_of()
    reranker = qpeft.Reranker(reranker.model, cache=qpeft.DocumentCache(1 << 20))
    reranker.predict((QUERY, DOCUMENT))
    first = reranker.spans(QUERY, DOCUMENT)
    assert reranker.cache.misses == 1
    rounded = qpeft.Reranker(reranker.model, cache=qpeft.DocumentCache(1 << 20, kv_dtype="int8"))
    assert {span.text for span in rounded.spans(QUERY, DOCUMENT, threshold=0)} == set(SENTENCES)
    in_small_passes = qpeft.Reranker(reranker.model, max_tokens_per_batch=1).spans(QUERY, DOCUMENT)
    assert [span.start for span in in_small_passes] == [span.start for span in first]
    assert reranker.spans(QUERY, DOCUMENT, instruction="In brief.") != first


def test_threshold_and_max_spans(reranker):
    spans = reranker.spans(QUERY, DOCUMENT, threshold=0)
    assert sum(span.score for span in spans) == pytest.approx(1)
    assert reranker.spans(QUERY, DOCUMENT, threshold=0, max_spans=2) == spans[:2]
    assert reranker.spans(QUERY, DOCUMENT, threshold=spans[1].score) == spans[:2]
    with pytest.raises(ValueError, match="spans: threshold must be in"):
        reranker.spans(QUERY, DOCUMENT, threshold=3)
    with pytest.raises(TypeError, match="spans: the document must be a string or a dict"):
        reranker.spans(QUERY, 3)


@pytest.mark.parametrize(("document", "texts"), [
    ("", []),
    ("  one sentence  ", ["one sentence"]),
    (f"  {TEXT}", SENTENCES),
])  # fmt: skip
def test_places_are_in_the_document_as_given(reranker, document, texts):
    spans = sorted(reranker.spans(QUERY, document, threshold=0), key=lambda span: span.start)
    assert [span.text for span in spans] == texts == [document[span.start : span.end] for span in spans]


def test_sentences_that_were_cut_have_no_share():
    spans = reranker_of(max_document_tokens=18).spans(QUERY, TEXT, threshold=0)  # within "Boats"
    assert sorted(span.text for span in spans) == ["Boats float!", "The moon pulls."]


@pytest.mark.parametrize("family", ["mamba", "t5"])
def test_lms_whose_keys_cannot_be_shared_read_changed_documents(family):
    reranker = reranker_of(family)
    alone = reranker.predict([(QUERY, DOCUMENT | {"text": words}) for words in SENTENCES])
    lacking = [TEXT.replace(words, " ", 1) for words in SENTENCES]
    without = reranker.predict([(QUERY, DOCUMENT | {"text": words}) for words in lacking])
    evidence = (alone - without).astype(np.float64)
    expected = np.exp(evidence / NATS) / np.exp(evidence / NATS).sum()
    by_text = {span.text: span.score for span in reranker.spans(QUERY, DOCUMENT, threshold=0)}
    assert [by_text[words] for words in SENTENCES] == pytest.approx(expected.tolist(), abs=2e-3)


@pytest.mark.parametrize("clues", ["top_k", "attention"])
def test_models_with_clues_give_words(clues):
    reranker = reranker_of(clues=clues, k=6, num_heads=4, rank=8)
    spans = reranker.spans(QUERY, DOCUMENT, threshold=0)
    assert spans and sum(span.score for span in spans) == pytest.approx(1)
    for span in spans:
        assert TEXT[span.start : span.end] == span.text == span.text.strip()
        assert not (TEXT[span.start - 1 : span.start].isalnum() and span.text[0].isalnum())
    heavier = reranker.spans(QUERY, DOCUMENT, threshold=0, likelihood=True)
    assert {span.text for span in heavier} == {span.text for span in spans}
    assert sum(span.score for span in heavier) == pytest.approx(1)


def clue(text: str, start: int, end: int, weight: float) -> ClueSpan:
    return ClueSpan(start, end, text[start:end], weight, "tides")


def test_tokens_become_words_and_words_phrases():
    text = "High tides rise, and boats float"
    whole = f"Sea {text}"
    places = [(whole.index(part), part) for part in ("Se", "ti", "des", " rise", ",", "oat")]
    clues = [clue(whole, start, start + len(part), 1.0) for start, part in places]
    found = clue_phrases(Explanation("q", whole, clues, text_start=4), text)
    assert [(text[a:b], share) for (a, b), share in found] == [("tides rise,", 0.8), ("boats", 0.2)]


def test_the_first_word_behind_a_title_is_in_the_text():
    """Many tokenizers, such as those of Llama 2 and Qwen, give a token the space before it, here that of the title."""
    text, whole = "tides rise", "Sea tides rise"
    clues = [clue(whole, 0, 3, 3.0), clue(whole, 3, 9, 2.0), clue(whole, 9, 14, 1.0)]
    explained = Explanation("q", whole, clues, text_start=4)
    assert [explained.place_in_document(span) for span in clues] == [None, (0, 5), (5, 10)]
    assert clue_phrases(explained, text) == [((0, 10), pytest.approx(1))]


def test_attention_that_all_tokens_get_makes_no_span():
    text = "a b c d e f g h"
    spans = [(i, i + 1) for i in range(0, 15, 2)]
    weights = [0.05, 0.05, 0.4, 0.3, 0.05, 0.05, 0.05, 0.05]
    clues = [clue(text, *place, weight) for place, weight in zip(spans, weights, strict=True)]
    explained = Explanation("q", text, clues, attention=AttentionMap(torch.zeros(1, 1, 8), ["q"], spans))
    ((place, share),) = clue_phrases(explained, text)
    assert (text[slice(*place)], share) == ("c d", pytest.approx(1))


def test_phrases_are_weighed_by_their_sentence():
    found = weighed([((0, 2), 0.5), ((6, 8), 0.5)], [((0, 4), 0.2), ((5, 9), 0.8)])
    assert found == [((0, 2), pytest.approx(0.2)), ((6, 8), pytest.approx(0.8))]
    assert [span.text for span in best_spans("abcdefghi", found, 0.3, None)] == ["gh"]


def test_a_title_that_leaves_no_room_has_no_spans():
    assert reranker_of(max_document_tokens=16).spans(QUERY, {"title": "sea and moon " * 3, "text": TEXT}) == []


def test_spans_are_of_the_passage_as_it_was_scored():
    """Tokens are bytes: of a title that is too long, the words that fit into 32 of 64 go with each passage."""
    document = {"title": "all the seas and all their moons and boats", "text": f"Boats. {TEXT}\n\n" * 3}
    passages = reranker_of(max_document_tokens=64, passages="max")
    (row,) = passages.rank(QUERY, [document])
    start, end = row["passage"]
    scored = {"title": "all the seas and all their", "text": document["text"][start:end]}
    whole = reranker_of(max_document_tokens=64)
    assert passages.score([(QUERY, scored)])[0] == pytest.approx(row["score"], abs=1e-3)
    expected = [(span.start + start, span.end + start, span.text) for span in whole.spans(QUERY, scored, threshold=0)]
    spans = passages.spans(QUERY, document, threshold=0)
    assert expected and [(span.start, span.end, span.text) for span in spans] == expected
    assert [document["text"][span.start : span.end] for span in spans] == [span.text for span in spans]
