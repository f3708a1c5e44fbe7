"""Suggestions for mistyped words, and when progress bars are shown."""

import io

from qpeft_ext.utils.progress import progress_bar
from qpeft_ext.utils.words import closest_words, did_you_mean


def test_a_typing_error_gets_a_suggestion_and_nonsense_none():
    assert did_you_mean("listwize", ["pairwise", "listwise"]) == "; did you mean 'listwise'?"
    assert did_you_mean("xyz", ["pairwise", "listwise"]) == ""
    assert did_you_mean(["k"] * 1000, ["k"]) == ""
    assert closest_words("listwis", ["listwise", "listwiser"], most=5) == ["listwise", "listwiser"]


def test_progress_bars_are_shown_on_request_or_on_a_terminal():
    for show, printed in ((None, False), (False, False), (True, True)):
        stream = io.StringIO()
        assert list(progress_bar(range(3), show=show, file=stream, desc="steps")) == [0, 1, 2]
        assert ("steps" in stream.getvalue()) == printed
