"""Documents that come again are not tokenised again, and are what they were."""

import pytest
from families.tiny import tiny_tokenizer

import qpeft_ext as qpeft
from qpeft_ext.prompts.pieces import DocumentPrefix
from qpeft_ext.prompts.prompt import Prompt
from qpeft_ext.prompts.recent import RecentDocuments


class Maker:
    """Makes a prefix of the length of a text, and remembers which texts it was asked for."""

    def __init__(self, cut=0):
        self.asked, self.cut = [], cut

    def __call__(self, texts):
        self.asked += texts
        return [DocumentPrefix((len(text),), 0, 1, self.cut) for text in texts]


def test_each_text_is_made_once_and_the_order_is_kept():
    recent, make = RecentDocuments(9), Maker()
    assert [p.ids for p in recent.prefixes(["a", "bb", "a"], make)] == [(1,), (2,), (1,)]
    assert [p.ids for p in recent.prefixes(["ccc", "bb"], make)] == [(3,), (2,)]
    assert recent.prefixes([], make) == [] and make.asked == ["a", "bb", "ccc"]
    recent.clear()
    recent.prefixes(["a"], make)
    assert make.asked[3:] == ["a"]


def test_the_ones_least_recently_asked_for_are_forgotten():
    recent, make = RecentDocuments(2), Maker()
    for text in ("a", "b", "a", "c"):
        recent.prefixes([text], make)
    recent.prefixes(["a", "b"], make)
    assert make.asked == ["a", "b", "c", "b"]


def test_texts_that_were_cut_are_not_kept():
    recent, make = RecentDocuments(2), Maker(cut=1)
    recent.prefixes(["a"], make)
    recent.prefixes(["a"], make)
    assert make.asked == ["a", "a"]


def test_a_prompt_tokenises_a_document_once_and_checks_it_again(monkeypatch):
    prompt, calls = Prompt(tiny_tokenizer(), qpeft.QPeftConfig()), []
    encode = prompt._encode_documents
    monkeypatch.setattr(prompt, "_encode_documents", lambda texts: calls.append(list(texts)) or encode(texts))
    first = prompt.documents(["tides rise", {"title": "tides", "text": "rise"}, "boats"])
    assert first[0] == first[1] and prompt.documents(["boats"]) == [first[2]]
    assert calls == [["tides rise", "boats"]]
    with pytest.raises(ValueError, match="embedding table has 1 rows"):
        prompt.expect_rows(1)
    with pytest.raises(ValueError, match="embedding table has 1 rows"):
        prompt.documents(["boats"])
