"""Prompt pieces, spans, truncation."""

import pytest
from families.tiny import tiny_tokenizer

import qpeft_ext as qpeft
from qpeft_ext.prompt import Prompt, document_text


@pytest.fixture
def prompt():
    return Prompt(tiny_tokenizer(), qpeft.QPeftConfig(max_document_tokens=10, max_query_tokens=8))


def text_of(prompt, ids):
    return prompt.tokenizer.decode(list(ids))


def test_the_whole_prompt_reads_as_designed(prompt):
    (prefix,), (query,) = prompt.documents([{"title": "Moon", "text": "sea"}]), prompt.queries(["why?"])
    assert text_of(prompt, prefix.ids) == "<s>Please write a question for the passage. Passage: Moon sea\n"
    assert text_of(prompt, prompt.suffix.hints) == "hints:"
    assert text_of(prompt, [*prompt.suffix.question, *query]) == "\nQuestion: why?"
    assert text_of(prompt, [*prompt.suffix.bare_question, *query]) == "Question: why?"


def test_the_document_span_holds_the_document_alone(prompt):
    prefix = prompt.documents(["sea"])[0]
    assert text_of(prompt, prefix.document_ids) == " sea" and prefix.cut == 0


def test_only_the_end_of_the_document_is_cut(prompt):
    whole, cut = prompt.documents(["123456789", "1234567890abc"])
    assert (whole.cut, cut.cut) == (0, 4)
    assert text_of(prompt, cut.document_ids) == " 123456789"
    assert cut.ids == whole.ids  # the template around it stays whole


def test_a_prefix_does_not_depend_on_its_neighbours(prompt):
    assert prompt.documents(["sea", "a longer one"])[0] == prompt.documents(["sea"])[0]


def test_an_empty_document_has_an_empty_span(prompt):
    prefix = prompt.documents([{"title": "", "text": " "}])[0]
    assert prefix.document_ids == () and prefix.cut == 0


@pytest.mark.parametrize("query", ["", "   ", "\n"])
def test_an_empty_query_is_an_error(prompt, query):
    with pytest.raises(ValueError, match="at least one token"):
        prompt.queries([query])


def test_a_long_query_is_named(prompt):
    with pytest.raises(ValueError, match=r"query 'why do tides rise\?' has 19 tokens, max_query_tokens is 8"):
        prompt.queries(["ok", "why do tides rise?"])


@pytest.mark.parametrize("document", [3, None, {"title": "x"}, {"text": 3}, {"text": "a", "title": 4}])
def test_a_document_of_the_wrong_kind_is_an_error(document):
    with pytest.raises(TypeError, match="a document"):
        document_text(document)


def test_offsets_point_into_the_document_text(prompt):
    document = {"title": "Moon", "text": "ür"}
    text, offsets = document_text(document), prompt.offsets(document)
    assert len(offsets) == len(prompt.documents([document])[0].document_ids)
    assert text[slice(*offsets[1])] == "M" and text[slice(*offsets[-1])] == "r"


def test_special_tokens_inside_a_document_do_not_move_the_span(prompt):
    prefix = prompt.documents(["a<s>b"])[0]
    assert prefix.ids[prefix.start : prefix.end] == prefix.document_ids and len(prefix.document_ids) == 4
