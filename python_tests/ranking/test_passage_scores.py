"""Documents scored by their passages: `Reranker(passages=…)`."""

import pickle

import numpy as np
import pytest
from families.tiny import tiny_lm, tiny_tokenizer

import qpeft_ext as qpeft
from qpeft_ext.prompts.prompt import Prompt
from qpeft_ext.ranking.passages import PassageScoring
from qpeft_ext.ranking.run import by_likelihood, by_similarity

QUERIES = ["why tides?", "boats"]
PARTS = ["Tides rise twice a day. The moon pulls.", "Boats leave the harbour, late.", "Gulls cry over the nets."]
LONG = "  " + " ".join(PARTS)  # a byte is a token, so a passage of 42 tokens is one of PARTS
TITLED = {"title": "Sea", "text": "Tides rise twice a day, not three times. The moon pulls. Boats leave."}
SHORT = "Boats leave."
DOCUMENTS = [SHORT, LONG, TITLED, ""]
SPANS = [[(2, 41), (42, 72), (73, 97)], [(0, 40), (41, 69)]]  # of LONG and TITLED
OF_TITLED = [{"title": "Sea", "text": "Tides rise twice a day, not three times."},
             {"title": "Sea", "text": "The moon pulls. Boats leave."}]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    config = qpeft.QPeftConfig(clues="top_k", k=3, rank=8, max_document_tokens=48)
    return qpeft.get_qpeft_model(tiny_lm("llama"), config, tiny_tokenizer())


def reranker(model, passages="max", **options):
    return qpeft.Reranker(model, passages=passages, **({"passage_tokens": 46, "deterministic": True} | options))


def scores_of_parts(model, query):
    """Scores of the passages, split by hand, as documents of their own."""
    alone = qpeft.Reranker(model, deterministic=True)
    return [alone.predict([(query, part) for part in parts]) for parts in (PARTS, OF_TITLED)]


def by_place(rows):
    return [row for _, row in sorted((row["corpus_id"], row) for row in rows)]


@pytest.mark.parametrize(("passages", "combine", "place"), [
    ("max", np.max, np.argmax),
    ("mean", np.mean, np.argmax),
    ("first", lambda scores: scores[0], lambda scores: 0),
])  # fmt: skip
def test_a_document_has_the_score_of_its_passages(model, passages, combine, place):
    ranked = reranker(model, passages).rank_many(QUERIES, [DOCUMENTS, DOCUMENTS])
    whole = qpeft.Reranker(model, deterministic=True)
    for query, rows in zip(QUERIES, ranked, strict=True):
        scores = [row["score"] for row in rows]
        assert scores == sorted(scores, reverse=True)
        short, long, titled, empty = by_place(rows)
        for row, parts, spans in zip((long, titled), scores_of_parts(model, query), SPANS, strict=True):
            assert row["score"] == pytest.approx(float(combine(parts)), rel=1e-6)
            assert row["passage"] == spans[place(parts)]
        assert [short["score"], empty["score"]] == whole.predict([(query, SHORT), (query, "")]).tolist()  # to the bit
        assert (short["passage"], empty["passage"]) == ((0, len(SHORT)), (0, 0))


def test_predict_and_rank_agree_whatever_the_blocks(model, monkeypatch):
    scorer = reranker(model)
    pairs = [(query, document) for query in QUERIES for document in DOCUMENTS]
    expected = scorer.predict(pairs)
    monkeypatch.setattr("qpeft_ext.ranking.lists._PAIRS_PER_BLOCK", 2)
    np.testing.assert_array_equal(scorer.predict(pairs), expected)
    rows = by_place(scorer.rank(QUERIES[1], DOCUMENTS, show_progress_bar=True))
    assert [row["score"] for row in rows] == expected[len(DOCUMENTS) :].tolist()
    assert scorer.rank(QUERIES[0], []) == [] and len(scorer.predict([])) == 0


def test_candidates_give_clues_with_all_their_passages():
    """With ``source="candidates"``, clues come from the passages of all documents that the query is ranked with."""
    config = qpeft.QPeftConfig(clues="top_k", k=3, rank=8, source="candidates", max_document_tokens=48)
    model = qpeft.get_qpeft_model(tiny_lm("llama"), config, tiny_tokenizer())
    parts = by_place(qpeft.Reranker(model, deterministic=True).rank(QUERIES[0], [SHORT, *PARTS, *OF_TITLED]))
    scores = [row["score"] for row in parts]
    rows = by_place(reranker(model).rank_many([QUERIES[0]] * 2, [[SHORT, LONG, TITLED], [SHORT]])[0])
    assert [row["score"] for row in rows] == [scores[0], max(scores[1:4]), max(scores[4:])]


def test_only_new_passages_are_read_the_second_time(model):
    scorer = reranker(model, deterministic=False, cache=qpeft.DocumentCache(1 << 24))
    scorer.rank(QUERIES[0], DOCUMENTS)
    assert scorer.cache.misses == 7  # three passages of LONG, two of TITLED, two documents
    grown = [LONG + " And so on.", {**TITLED, "text": TITLED["text"] + " Nets dry in the sun."}]
    scorer.rank_many(QUERIES, [DOCUMENTS, grown])
    assert scorer.cache.misses == 9  # the last passage of LONG is another one now; of TITLED there is a third
    assert scorer.truncated == 0


def test_what_is_cut_and_split_is_counted(model):
    scorer = reranker(model)
    titled = {"title": "t" * 100, "text": "Tides rise."}
    scorer.predict([(query, document) for query in QUERIES for document in ["a sentence of words " * 4, titled]])
    assert (scorer.truncated, scorer.passages.cut_titles, scorer.passages.long_sentences) == (1, 1, 1)
    assert "passages: max of 46 tokens, every 46" in repr(scorer)


def test_similarity_takes_passages_too(model):
    whole, scorer = qpeft.Reranker(model), reranker(model)
    parts, titled = whole.similarity([QUERIES[0]] * 2, [PARTS, OF_TITLED])
    assert scorer.similarity(QUERIES, [[LONG, TITLED], []]) == [pytest.approx([max(parts), max(titled)]), []]
    ranking = by_similarity(scorer)(QUERIES[:1], [[LONG, TITLED]])
    assert [score for _, score in ranking[0]] == pytest.approx(sorted([max(parts), max(titled)], reverse=True))


def test_a_reranker_with_passages_is_pickled(model):
    copy = pickle.loads(pickle.dumps(reranker(model).passages))
    assert [len(each) for each in copy.split(DOCUMENTS)] == [1, 3, 2, 1]
    assert by_likelihood(reranker(model))(QUERIES[:1], [[LONG]])[0][0][0] == 0


@pytest.mark.parametrize(("options", "message"), [
    ({"passages": "best"}, "passages must be max, mean or first, got 'best'"),
    ({"passages": "max", "passage_tokens": 49}, "passage_tokens must be at most max_document_tokens = 48, got 49"),
    ({"passage_tokens": 20}, "passage_tokens is of no use without passages; give passages='max'"),
])  # fmt: skip
def test_wrong_options(model, options, message):
    with pytest.raises(ValueError, match=message):
        qpeft.Reranker(model, **options)


def test_scores_are_combined_by_hand():
    prompt = Prompt(tiny_tokenizer(), qpeft.QPeftConfig())
    scores, counts = np.array([-3, -1, -1, -5, -2], dtype=np.float32), [3, 1, 1]
    for combine, expected in (("max", [-1, -5, -2]), ("mean", [-5 / 3, -5, -2])):
        values, best = PassageScoring(prompt, combine).combined(scores, counts)
        assert values.dtype == np.float32 and best == [1, 0, 0]
        np.testing.assert_array_equal(values, np.array(expected, dtype=np.float32))
