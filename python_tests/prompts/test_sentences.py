"""Borders of sentences: a table of texts, split by hand with ``|``."""

import random

import pytest

from qpeft_ext.prompts.sentences import sentence_spans, word_spans


@pytest.mark.parametrize("split", [
    "One sentence without an end",
    "It rains. |Boats stay in. ",
    "Why? |Because! |Really?! |Yes… |Well",
    'He said "no." |She left (at last.) |Then “so it is.” |End',
    "the end… of it. and so on",  # lowercase letters follow
    "Dr. Smith and Mrs. Jones, St. Petersburg vs. Ada. |Next",
    "J. R. R. Tolkien wrote it. |He and I. |Next",
    "E.g. This, i.e. That, the U.S. Army, a Ph.D. Student. |Next",
    "See Fig. 5, No. 7 and pp. 10-12. |He said no. |Then he left.",
    "Version 3.14 costs 2.50. |Next",
    "See foo.py. |Next",
    "東京は大きい。|大阪も！|そう？|はい",
    "「行く。」|彼は言った。",
    "यह है।|वह था।",
    "هل هذا؟|نعم۔|لا",
    "def f(x):\n|    return x\r\n\n|print(f(1))\n",
    "a line\n|another\u2028|a third",
    "3 * 4. |5 is next.",
    "",
    " \n ",
])  # fmt: skip
def test_sentences(split):
    text = split.replace("|", "")
    expected = [part.strip() for part in split.split("|") if part.strip()]
    assert [text[start:end] for start, end in sentence_spans(text)] == expected


def test_no_text_is_lost():
    """Whatever the text, spans are in order and do not overlap, and what is outside is space."""
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(draw.choice("aB1.!?。\n\t \"'()…é") for _ in range(draw.randrange(60)))
        end = 0
        for start, following in sentence_spans(text):
            assert not text[end:start].strip() and text[start:following] == text[start:following].strip()
            assert start < following
            end = following
        assert not text[end:].strip()


def test_words():
    assert word_spans("to  be or\nnot", (4, 13)) == [(4, 6), (7, 9), (10, 13)]
