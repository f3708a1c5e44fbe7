"""Long documents as passages: where they are split, and what the LM reads of them."""

import pytest
from families.tiny import tiny_tokenizer

import qpeft_ext as qpeft
from qpeft_ext.model import build_prompt
from qpeft_ext.prompts.passages import Splitter, check_passages, pack
from qpeft_ext.prompts.prompt import Prompt

SENTENCES = ["Tides rise.", "The moon pulls.", "Boats leave.", "Nets dry in the sun.", "Gulls cry."]  # 12 to 21 tokens


@pytest.fixture(scope="module")
def prompt():
    """One token for each byte, and one for the space before a text."""
    return Prompt(tiny_tokenizer(), qpeft.QPeftConfig(max_document_tokens=60))


def texts(splitter, document):
    """The text of each passage, with the title where there is one; the spans are checked."""
    (split,) = splitter.splits([document])
    own = document if isinstance(document, str) else document["text"]
    found = []
    for passage, start, end in splitter.passages(document, split):
        if split.title:
            assert passage == {"title": split.title, "text": own[start:end]}
            found.append(f"{split.title} | {own[start:end]}")
        else:
            assert passage in (own[start:end], document)
            found.append(own[start:end])
    assert all(prefix.cut == 0 for prefix in splitter.prompt.documents(splitter.parts([document])))
    return found


@pytest.mark.parametrize(("counts", "ends", "expected"), [
    ([4, 4, 4, 4], {2}, [(0, 2), (2, 4)]),
    ([4, 4, 4, 4], {1}, [(0, 3), (3, 4)]),  # a passage of 4 is less than half full
    ([4, 4, 4, 4], {2, 3}, [(0, 3), (3, 4)]),
    ([4, 4, 2], {2}, [(0, 3)]),
])  # fmt: skip
def test_passages_end_with_a_paragraph(counts, ends, expected):
    assert pack(counts, 13, 13, ends) == expected


def test_joined_units_may_be_longer_than_their_parts():
    assert pack([5] * 5, 15, 15, excess=lambda first, last: last - first - 2) == [(0, 2), (2, 4), (4, 5)]
    assert pack([5] * 3, 15, 15, excess=lambda first, last: 1) == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize(("counts", "room", "stride", "expected"), [
    ([], 10, 10, []),
    ([3], 10, 10, [(0, 1)]),
    ([5, 5, 5], 10, 10, [(0, 2), (2, 3)]),
    ([5, 5, 5], 9, 9, [(0, 1), (1, 2), (2, 3)]),
    ([20, 5, 20], 10, 10, [(0, 1), (1, 2), (2, 3)]),
    ([5, 5, 5, 5], 10, 5, [(0, 2), (1, 3), (2, 4)]),
    ([5, 5, 5, 5], 10, 1, [(0, 2), (1, 3), (2, 4)]),
    ([2, 2, 2, 2, 2, 2], 8, 3, [(0, 4), (2, 6)]),
    ([2, 9, 2], 10, 5, [(0, 1), (1, 2), (2, 3)]),
])  # fmt: skip
def test_units_are_packed(counts, room, stride, expected):
    assert pack(counts, room, stride) == expected


def test_passages_are_whole_sentences(prompt):
    document = " ".join(SENTENCES)
    assert texts(Splitter(prompt), document) == [" ".join(SENTENCES[:3]), " ".join(SENTENCES[3:])]
    assert (
        texts(Splitter(prompt, tokens=40), document)
        == [
            " ".join(SENTENCES[:2]),  # 28 tokens, a third sentence would make 41
            " ".join(SENTENCES[2:4]),
            SENTENCES[4],
        ]
    )
    assert texts(Splitter(prompt, tokens=40, stride=12), document) == [
        " ".join(SENTENCES[:2]),
        " ".join(SENTENCES[1:3]),
        " ".join(SENTENCES[2:4]),
        " ".join(SENTENCES[3:]),
    ]


def test_the_title_goes_with_each_passage(prompt):
    document = {"title": " Sea ", "text": "  " + " ".join(SENTENCES)}  # the spaces move the spans
    assert texts(Splitter(prompt, tokens=40), document) == [
        "Sea | Tides rise. The moon pulls.",
        "Sea | Boats leave. Nets dry in the sun.",
        "Sea | Gulls cry.",
    ]


def test_what_fits_stays_as_it_is(prompt):
    splitter = Splitter(prompt, tokens=40)
    for document in ("x" * 39, {"title": "Sea", "text": " " + "y" * 34}, "", {"text": "\n"}):
        (split,) = splitter.splits([document])
        (passage,) = splitter.passages(document, split)
        text = document if isinstance(document, str) else document["text"]
        assert passage.document is document and (passage.start, passage.end) == (0, len(text))
    assert len(texts(splitter, "x" * 40)) == 2


def test_long_sentences_words_and_titles(prompt):
    """A sentence is split between words, a word between characters, and a title is cut to half a passage."""
    splitter = Splitter(prompt, tokens=20)
    sentence = "the boats of the harbour leave"
    (split,) = splitter.splits([sentence])
    assert texts(splitter, sentence) == ["the boats of the", "harbour leave"] and split.long_sentences == 1
    word = "x" * 50
    assert "".join(texts(splitter, word)) == word and splitter.splits([word])[0].long_sentences == 1
    titled = {"title": "A long title", "text": "Tides rise. Boats leave."}
    (split,) = splitter.splits([titled])
    assert split.title == "A long" and split.cut
    assert texts(splitter, titled) == ["A long | Tides rise.", "A long | Boats leave."]
    (split,) = splitter.splits([{"title": "t" * 100, "text": "Tides rise."}])
    assert set(split.title) == {"t"} and len(split.title) <= 10


def test_code_is_split_between_functions_and_lines(prompt):
    """Line breaks and indentation, which are tokens here, do not make passages too long."""
    functions = [f"def f{i}(x):\n        y = x * {i}\n        return y" for i in range(4)]  # 44 tokens each
    assert texts(Splitter(prompt), "\n\n\n".join(functions)) == functions
    assert texts(Splitter(prompt, tokens=36), functions[0]) == ["def f0(x):\n        y = x * 0", "return y"]
    wide = "word" + " " * 90 + "word" + "\n" * 90 + "word"
    assert texts(Splitter(prompt), wide) == ["word"] * 3


def test_a_document_that_grew_keeps_its_first_passages(prompt):
    splitter = Splitter(prompt, tokens=40)
    before, after = (texts(splitter, " ".join(sentences)) for sentences in (SENTENCES, [*SENTENCES, "More."] * 2))
    assert after[: len(before) - 1] == before[:-1] and len(after) > len(before)


def test_remembered_splits_are_those_of_the_text(prompt, monkeypatch):
    """Also when the splitter forgets because it remembers too many, and for texts that differ in spaces only."""
    monkeypatch.setattr("qpeft_ext.prompts.passages._MOST_KEPT", 2)
    splitter = Splitter(prompt, tokens=40)
    documents = [
        " ".join(SENTENCES),
        "  " + " ".join(SENTENCES),
        {"title": "Sea", "text": " ".join(SENTENCES)},
        "short",
    ]
    for _ in range(2):
        assert splitter.splits(documents) == [Splitter(prompt, tokens=40).splits([each])[0] for each in documents]
    assert splitter.splits([]) == []


def test_encoder_decoders_and_the_official_prompt_have_passages_too(prompt):
    t5 = build_prompt(tiny_tokenizer("$A </s>"), qpeft.QPeftConfig(clues="none", max_document_tokens=60), True)
    assert texts(Splitter(t5), " ".join(SENTENCES)) == texts(Splitter(prompt), " ".join(SENTENCES))


@pytest.mark.parametrize(("options", "message"), [
    ({"tokens": 61}, "passage_tokens must be at most max_document_tokens = 60, got 61; lower it"),
    ({"tokens": 15}, "passage_tokens must be at least 16, got 15"),
    ({"stride": 0}, "passage_stride must be at least 1, got 0"),
    ({"tokens": 20, "stride": 21}, "passage_stride must be at most passage_tokens = 20, got 21; otherwise text"),
])  # fmt: skip
def test_wrong_lengths(prompt, options, message):
    with pytest.raises(ValueError, match=message):
        Splitter(prompt, **options)


def test_wrong_options():
    with pytest.raises(ValueError, match="passages must be max, mean or first, got 'sum'"):
        check_passages("sum", None, None)
    with pytest.raises(ValueError, match="passage_stride is of no use without passages"):
        check_passages(None, None, 5)
    with pytest.raises(ValueError, match="need max_document_tokens of at least 16, got 10"):
        Splitter(Prompt(tiny_tokenizer(), qpeft.QPeftConfig(max_document_tokens=10)))
    with pytest.raises(TypeError, match="document 1 must be a string or a dict"):
        Splitter(Prompt(tiny_tokenizer(), qpeft.QPeftConfig())).splits(["a", 5])
