"""DPR's matching rule: whether a passage has the answer."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpeft_ext.formats import answers

# -- the matching rule ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, answer, held",
    [
        ("The Beatles sang it.", "the beatles", True),
        ("It was beat.", "Beatles", False),
        ("beatles", "the beatles", False),
        ("in 1984, they", "1984", True),
        ("in 19845", "1984", False),
        ("U.S. Army", "U.S.", True),
        ("US Army", "U.S.", False),
        ("Zu\u0308rich", "Z\u00fcrich", True),
        ("Zurich", "Z\u00fcrich", False),
        ("a  b\tc", "a b c", True),
        ("snake_case", "snake", True),
        ("anything", "", False),
        ("anything", " \t", False),
        ("", "a", False),
        ("東京", "東", False),
        ("50 % of", "50%", True),
        ("a b a b c", "a b c", True),
    ],
)
def test_has_answer(text, answer, held):
    assert answers.has_answer(text, ["never there", answer]) is held


_SOME = st.text(
    st.sampled_from("aAbé\u0301ß9٣ _-.'’,%\u00a0\u3000\t\n\u200b東京\u093e")
    | st.characters(max_codepoint=0x2FFF, exclude_categories=["Cn", "Cs"]),
    max_size=12,
)


@settings(max_examples=400, deadline=None)
@given(text=_SOME, answer=_SOME, joined=st.booleans())
def test_has_answer_is_dprs_rule(text, answer, joined):
    """Against DPR's tokenizer as it is written there, with the Unicode classes of the package regex."""
    regex = pytest.importorskip("regex")

    def tokens(value):
        pattern = r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]"
        return [token.lower() for token in regex.findall(pattern, unicodedata.normalize("NFD", value))]

    text = f"{text} {answer} {text}" if joined else text
    wanted, there = tokens(answer), tokens(text)
    expected = any(there[i : i + len(wanted)] == wanted for i in range(len(there))) if wanted else False
    assert answers.has_answer(text, [answer]) is expected
