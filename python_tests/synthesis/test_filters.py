"""The filters of generated queries, one by one, and the round trip through BM25."""

import math
from collections import Counter

import pytest

from qpeft_ext.ranking.first_stage import bm25_run
from qpeft_ext.synthesis.filters import Counts, Filters, KeptQuery, select
from qpeft_ext.synthesis.generator import GeneratedQuery
from qpeft_ext.synthesis.training_set import choose_documents, round_trip

pytest.importorskip("bm25s", reason="the extra qpeft_ext[bm25] is not installed")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QPEFT_CACHE", str(tmp_path / "cache"))


CORPUS = {
    f"d{i}": {"id": f"d{i}", "title": "", "text": text}
    for i, text in enumerate(
        [
            "the sea rises because the moon pulls it twice a day",
            "boats lie in the harbour at low tide",
            "wind makes waves",
            "the moon is round",
            "",
        ]
    )
}


def query(text, ended=True, log_likelihood=-1.0, num_tokens=5):
    return GeneratedQuery(text, ended, log_likelihood, num_tokens)


def kept_texts(generated, dropped=None, **filters):
    generated = {doc_id: generated.get(doc_id, []) for doc_id in CORPUS if CORPUS[doc_id]["text"]}
    kept = select(generated, CORPUS, list(CORPUS), Filters(**filters), Counter() if dropped is None else dropped)
    return [query.text for query in kept]


def test_a_query_at_the_border_of_a_filter_is_kept():
    """Half of its words differ, it has the fewest tokens, the lowest likelihood; three words of the document."""
    at_borders = ["sea sea moon moon", "why tides", "which tides", "twice a day"]
    queries = [query(at_borders[0]), query(at_borders[1], num_tokens=3), query(at_borders[2], log_likelihood=-2.0)]
    assert kept_texts({"d0": [*queries, query(at_borders[3])]}, min_log_likelihood=-2.0) == at_borders


@pytest.mark.parametrize(("share", "count", "kept"), [(0.07, 100, 7), (0.55, 100, 55), (0.1, 15, 2), (0.001, 10, 1)])
def test_the_share_that_is_kept_is_rounded_up_but_not_for_rounding(share, count, kept):
    """0.07 · 100 is 7.000000000000001, which is no reason for an eighth query."""
    likelihoods = [-1.0 - i / 1000 for i in range(count)]
    queries = [query(f"why tide {i}", log_likelihood=x) for i, x in enumerate(likelihoods)]
    assert kept_texts({"d0": queries}, keep_fraction=share) == [f"why tide {i}" for i in range(kept)]


@pytest.mark.parametrize(
    "bad, filters, why",
    [
        (query(""), {}, "have no word"),
        (query("?! …"), {}, "have no word"),
        (query("why\ufffd tides"), {}, "hold undecodable bytes"),
        (query("why tides", ended=False), {}, "have no end within max_new_tokens"),
        (query("why", num_tokens=2), {}, "have fewer than 3 tokens"),
        (query("sea sea sea moon moon"), {}, "repeat themselves"),
        (query("why tides", log_likelihood=None), {}, "are longer than max_query_tokens"),
        (query("The Moon pulls it!"), {}, "are copied from their document"),
        (query("why tides", log_likelihood=-2.01), {"min_log_likelihood": -2.0}, "have a mean log-likelihood below -2"),
    ],
)
def test_each_filter(bad, filters, why):
    """Of two queries the bad one goes, is counted under its reason, and the good one stays."""
    dropped = Counter()
    assert kept_texts({"d0": [query("why do tides rise", log_likelihood=-2.0), bad]}, dropped, **filters) == [
        "why do tides rise"
    ]
    reasons = [reason for reason, count in dropped.items() if count and reason != "documents have no text"]
    assert len(reasons) == 1 and reasons[0].startswith(why)
    assert dropped["documents have no text"] == 1  # d4


def test_what_is_no_fault():
    good = [query("moon pulls it"), query("sea sea moon wind"), query("潮の満ち引きはなぜ")]  # three words are no copy
    assert kept_texts({"d0": good}) == [q.text for q in good]
    assert kept_texts({"d0": [query("why tides", ended=False)]}, keep_unfinished=True) == ["why tides"]


def test_equal_queries():
    dropped = Counter()
    generated = {"d0": [query("Why tides?"), query("why TIDES"), query("what is it")], "d1": [query("What is it?")]}
    assert kept_texts(generated, dropped) == ["Why tides?"]
    assert dropped["are the same as another of their document"] == 1
    assert dropped["were generated for several documents"] == 2


def test_the_likeliest_fraction():
    generated = {
        "d0": [query(f"query {x}", log_likelihood=x) for x in (-3.0, -1.0, -2.0)],
        "d1": [query("other one", log_likelihood=-2.5)],
    }
    dropped = Counter()
    assert kept_texts(generated, dropped, keep_fraction=0.5) == ["query -1.0", "query -2.0"]  # their order stays
    assert dropped["are not among the likeliest"] == 2
    assert len(kept_texts(generated, keep_fraction=0.51)) == 3  # rounded up


def test_round_trip_and_negatives():
    """Against BM25 asked for each query by itself."""
    texts = {"d0": "moon twice", "d1": "waves wind", "d2": "waves", "d3": "zebra"}
    kept = [KeptQuery(f"{doc_id}-0", doc_id, text, -1.5) for doc_id, text in texts.items()]
    counts, filters = Counts(4, 4), Filters(round_trip_top=1, num_negatives=2, depth=3)
    examples = list(round_trip(kept, CORPUS, filters, 0, counts))
    assert [(e["query_id"], e["query"], e["round_trip_rank"]) for e in examples] == [
        ("d0-0", "moon twice", 1),
        ("d2-0", "waves", 1),
    ]
    assert examples[0]["positives"] == [CORPUS["d0"]] and examples[0]["log_likelihood"] == -1.5
    assert [document["id"] for document in examples[0]["negatives"]] == ["d3"]  # the other one with a moon
    assert counts.dropped == {"do not bring their document back among BM25's best 1": 2} and counts.fewer_negatives == 2
    wide = list(round_trip(kept, CORPUS, Filters(round_trip_top=0), 0, Counts(4, 4)))
    run = bm25_run(CORPUS, {e["query_id"]: e["query"] for e in wide})
    ranks = {e["query_id"]: e["round_trip_rank"] for e in wide}
    places = {q: [doc_id for doc_id, _ in ranking] for q, ranking in run.items()}
    assert ranks == {q: found.index(q[:2]) + 1 if q[:2] in found else None for q, found in places.items()}
    assert ranks["d1-0"] is None and ranks["d2-0"] == 1
    bare = list(round_trip(kept, CORPUS, Filters(round_trip_top=0, num_negatives=0), 0, Counts(4, 4)))
    assert [e["negatives"] for e in bare] == [[]] * 4 and {e["round_trip_rank"] for e in bare} == {None}


def test_choice_of_documents():
    ids = [f"d{i}" for i in range(50)]
    some = choose_documents(dict.fromkeys(ids), 10, 0)
    assert len(some) == 10 and some == sorted(some, key=ids.index) == choose_documents(dict.fromkeys(ids), 10, 0)
    assert some != choose_documents(dict.fromkeys(ids), 10, 1)
    assert choose_documents(dict.fromkeys(ids), None, 0) == choose_documents(dict.fromkeys(ids), 99, 0) == ids


@pytest.mark.parametrize(
    "options, message",
    [
        ({"min_tokens": 0}, "min_tokens must be at least 1"),
        ({"keep_fraction": 0}, "keep_fraction must be above 0"),
        ({"keep_fraction": 1.5}, "got 1.5"),
        ({"min_log_likelihood": 0.5}, "0 at most, got 0.5"),
        ({"min_log_likelihood": math.nan}, "got nan"),
        ({"num_negatives": -1}, "num_negatives must be at least 0"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"round_trip_top": -1}, "round_trip_top must be at least 0"),
    ],
)
def test_impossible_filters(options, message):
    with pytest.raises(ValueError, match=message):
        Filters(**options)
