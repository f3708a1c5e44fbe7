"""Prompt pieces, spans, truncation."""

import json
from pathlib import Path

import numpy as np
import pytest
from families.tiny import tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

import qpeft_ext as qpeft
from qpeft_ext.config.values import WRITTEN_TEMPLATES
from qpeft_ext.lm.loading import load_tokenizer
from qpeft_ext.prefixes.manifest import expect_same_prompt, prompt_settings
from qpeft_ext.prompts.prompt import Prompt, document_text
from qpeft_ext.prompts.templates import BY_NAME
from qpeft_ext.utils.text_tokens import TextTokenizer

BASE_LM = Path(qpeft.__file__).parent / "demo" / "base_lm"


@pytest.fixture
def prompt():
    return Prompt(tiny_tokenizer(), qpeft.QPeftConfig(max_document_tokens=10, max_query_tokens=8))


def test_every_name_of_a_template_has_one():
    assert tuple(BY_NAME) == WRITTEN_TEMPLATES


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


@pytest.mark.parametrize("allowed", [False, True])
def test_special_tokens_inside_a_document_do_not_move_the_span(allowed):
    prompt = Prompt(tiny_tokenizer(), qpeft.QPeftConfig(allow_special_tokens=allowed))
    prefix = prompt.documents(["a<s>b"])[0]
    assert prefix.ids[prefix.start : prefix.end] == prefix.document_ids
    assert len(prefix.document_ids) == (4 if allowed else 6)  # the words of <s> are three letters


def test_the_words_of_special_tokens_are_text_unless_they_are_allowed():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<ball>"])
    tokenizer.add_tokens([AddedToken("<|im_start|>", lstrip=True, special=True)], special_tokens=True)
    text = "a <ball></s> <|im_start|>é"
    prompts = {allowed: Prompt(tokenizer, qpeft.QPeftConfig(allow_special_tokens=allowed)) for allowed in (False, True)}
    letters = [f"{word:s}" for word in ("Ġ", "a", "Ġ", "<ball>", *"</s>", "Ġ", *"<|im_start|>", "Ã", "©")]
    found = {
        allowed: (prompt.documents([text])[0].document_ids, prompt.queries([text])[0])
        for allowed, prompt in prompts.items()
    }
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in map(list, found[False])] == [letters] * 2
    assert found[True][0] == tuple(tokenizer(f" {text}", add_special_tokens=False)["input_ids"])
    assert {1, len(tokenizer) - 1} < set(found[True][1])
    for prompt in prompts.values():
        assert prompt.count(text) == len(prompt.queries([text])[0])
        assert len(prompt.offsets(text)) == len(prompt.documents([text])[0].document_ids)
    assert tokenizer("</s>", add_special_tokens=False)["input_ids"] == [1]  # the user's tokenizer is as it was
    framed = Prompt(tokenizer, qpeft.QPeftConfig(instruction="<|im_start|>user"))  # an instruction is ours
    assert len(tokenizer) - 1 in framed.documents(["sea"])[0].ids[:3]


class LettersInPython(PreTrainedTokenizer):
    """A slow tokenizer, whose ``split_special_tokens`` would split every added token."""

    def __init__(self, **options) -> None:
        self.letters = {letter: i for i, letter in enumerate(["<s>", "</s>", "<unk>", *"abcdeslr <>/:.?\n"])}
        super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<unk>", **options)

    vocab_size = property(lambda self: len(self.letters))

    def get_vocab(self) -> dict:
        return self.letters | self._added_tokens_encoder

    def _tokenize(self, text, **_) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.letters.get(token, 2)

    def _convert_id_to_token(self, index: int) -> str:
        return list(self.letters)[index]


def unigram() -> PreTrainedTokenizerFast:
    """As of T5: the model takes ``</s>`` for a piece like any other, and has no "<"."""
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -2.0),
        ("▁a", -2.5),
        ("ab", -2.5),
        *((letter, -3.0) for letter in "absé/>"),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def whole_words() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[SEP]": 1, "a": 2, "ab": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, sep_token="[SEP]", unk_token="[UNK]")


def merged() -> PreTrainedTokenizerFast:
    """A BPE with a merge that makes ``<s>``."""
    vocabulary = {piece: i for i, piece in enumerate(["<s>", "<", "s", ">", "<s", "a", "b", " ", "/", "é"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("<", "s"), ("<s", ">")]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


TOKENIZERS = {
    "unigram": (unigram, "ab</s>a", [["▁", "ab", "<unk>", "/", "s", ">", "a"]]),
    "whole words": (whole_words, "a [SEP] ab", [["a", "[UNK]", "ab"]]),
    "merges": (merged, "a<s>b", [["a", "<s", ">", "b"]]),
    "bytes": (tiny_tokenizer, "a</s>", [["a", "<", "/", "s", ">"]]),
    "in Python": (LettersInPython, "a<s>b", [["a", "<", "s", ">", "b"]]),
    "packaged": (lambda: load_tokenizer(BASE_LM), "a<bos>b", [["a", "<", "bos", ">", "b"]]),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_kind_of_tokenizer_makes_a_control_token_of_a_text(name):
    make, text, expected = TOKENIZERS[name]
    tokenizer = make()
    tokenizer.add_tokens(["sab"])
    as_text, by_itself = TextTokenizer(tokenizer, False), TextTokenizer(tokenizer, True)
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in as_text([text])] == expected
    both = as_text([f"{text} sab"])[0]
    assert both[-1] == tokenizer.convert_tokens_to_ids("sab") and not set(both) & (
        set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    )
    control = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert control & set(by_itself([text])[0])
    draw = np.random.default_rng(0)
    texts = ["".join(draw.choice(list("ab sé/>"), 30)) for _ in range(100)]  # without "<": no special token in them
    assert as_text(texts) == by_itself(texts) == tokenizer(texts, add_special_tokens=False)["input_ids"]
    if tokenizer.is_fast:
        assert len(as_text.offsets(text)) == len(expected[0])


def test_adapters_saved_before_the_choice_keep_their_tokens(tmp_path):
    assert qpeft.QPeftConfig().allow_special_tokens is False
    assert qpeft.QPeftConfig(compat="official").allow_special_tokens is True  # as the official code reads texts
    path = tmp_path / "adapter_config.json"
    for values, expected in (({}, True), ({"allow_special_tokens": False}, False)):
        path.write_text(json.dumps({"peft_type": "QPEFT", "clues": "none"} | values))
        assert qpeft.QPeftConfig.from_pretrained(tmp_path).allow_special_tokens is expected
    with pytest.raises(TypeError, match="allow_special_tokens must be True or False, got 'no'"):
        qpeft.QPeftConfig(allow_special_tokens="no")


def test_an_index_knows_how_special_tokens_were_read(tmp_path):
    prompts = {
        allowed: Prompt(tiny_tokenizer(), qpeft.QPeftConfig(allow_special_tokens=allowed)) for allowed in (False, True)
    }
    before = prompt_settings(prompts[True])
    before.pop("allow_special_tokens")  # as it was written before there was a choice
    expect_same_prompt(tmp_path, {"prompt": before}, prompt_settings(prompts[True]))
    with pytest.raises(ValueError, match="made with allow_special_tokens=True, here it is False"):
        expect_same_prompt(tmp_path, {"prompt": before}, prompt_settings(prompts[False]))


def test_long_queries_are_cut_at_their_end_on_request(prompt):
    cut: list[int] = []
    short, long = prompt.queries(["ok", "why do tides rise?"], cut)
    assert text_of(prompt, long) == " why do " and len(long) == 8 and cut == [1]
    assert short == prompt.queries(["ok"])[0]


def test_a_token_that_the_lm_does_not_have_is_named(prompt):
    prompt.expect_rows(258)
    prompt.tokenizer.add_tokens(["<ball>"])
    prompt.documents(["ball"])
    for call in (lambda: prompt.documents(["sea", "a <ball>"]), lambda: prompt.queries(["a <ball>"])):
        with pytest.raises(
            ValueError,
            match=r"'a <ball>' has the token '<ball>' with the id 258, .* has 258 rows; "
            r"call lm.resize_token_embeddings\(259\) first",
        ):
            call()
    with pytest.raises(ValueError, match="the prompt's template has the token"):
        prompt.expect_rows(50)
