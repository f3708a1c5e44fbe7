"""Suggestions for mistyped words, singular and plural, and when progress bars are shown."""

import io

from qpeft_ext.utils.progress import progress_bar
from qpeft_ext.utils.words import closest_words, counted, did_you_mean, singular


def test_a_typing_error_gets_a_suggestion_and_nonsense_none():
    assert did_you_mean("listwize", ["pairwise", "listwise"]) == "; did you mean 'listwise'?"
    assert did_you_mean("xyz", ["pairwise", "listwise"]) == ""
    assert did_you_mean(["k"] * 1000, ["k"]) == ""
    assert closest_words("listwis", ["listwise", "listwiser"], most=5) == ["listwise", "listwiser"]


def test_one_is_in_the_singular():
    assert [counted(n, "queries") for n in (0, 1, 2, 1000)] == ["0 queries", "1 query", "2 queries", "1000 queries"]
    assert counted(1, "are here", "is here") == "1 is here" and counted(2, "are here", "is here") == "2 are here"
    assert counted(12345, "pairs", spec=",") == "12,345 pairs"
    for many, one in {
        "training examples": "training example",
        "relevant documents that the corpus does not hold": "relevant document that the corpus does not hold",
        "queries' answers": "queries' answer",  # the possessive is none
        "grades other than 0 and 1": "grade other than 0 and 1",
    }.items():
        assert singular(many) == one


def test_progress_bars_are_shown_on_request_or_on_a_terminal():
    for show, printed in ((None, False), (False, False), (True, True)):
        stream = io.StringIO()
        assert list(progress_bar(range(3), show=show, file=stream, desc="steps")) == [0, 1, 2]
        assert ("steps" in stream.getvalue()) == printed
