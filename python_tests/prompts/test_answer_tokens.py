"""The tokens that answer behind a query."""

import pytest
from families.tiny import tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qpeft_ext import QPeftConfig
from qpeft_ext.prompts.answers import answer_tokens, asked_text
from qpeft_ext.prompts.prompt import Prompt


def with_words(*words: str) -> PreTrainedTokenizerFast:
    """The byte tokenizer with tokens for some words."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    return tokenizer


def texts(tokenizer, config: QPeftConfig) -> list[set[str]]:
    return [{tokenizer.decode([i]) for i in ids} for ids in answer_tokens(tokenizer, config)]


def test_every_form_that_is_one_token_answers():
    tokenizer = with_words("yes", " yes", "Yes", " YES", "no", " No")
    assert texts(tokenizer, QPeftConfig(score="yes_no")) == [{"yes", " yes", "Yes", " YES"}, {"no", " No"}]
    assert texts(tokenizer, QPeftConfig(score="both")) == [{"yes", " yes", "Yes", " YES"}, {"no", " No"}]
    exact = QPeftConfig(score="yes_no", yes_words=" yes", no_words="no", exact_words=True)
    assert texts(tokenizer, exact) == [{" yes"}, {"no"}]
    several = QPeftConfig(score="yes_no", yes_words=("yes", "y"), no_words=("no", "n"))
    assert texts(tokenizer, several)[1] == {"no", " No", "n", "N"}


def test_pieces_of_a_tokenizer_that_puts_spaces_itself():
    vocabulary = [("<unk>", 0.0), ("▁", -3.0), ("▁yes", -1.0), ("yes", -1.5), ("▁Yes", -1.2), ("▁no", -1.0),
                  ("a", -2.0), ("\n", -2.0), (":", -2.0), *((letter, -9.0) for letter in "YESNOyesno")]  # fmt: skip
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    found = answer_tokens(fast, QPeftConfig(score="yes_no"))
    assert [set(fast.convert_ids_to_tokens(list(ids))) for ids in found] == [{"▁yes", "yes", "▁Yes"}, {"▁no"}]


def test_the_token_of_unknown_words_is_no_answer():
    """Every word that a whole-word tokenizer does not know has it."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "no": 1, "a": 2, ":": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    with pytest.raises(ValueError, match="yes_words: 'yes' must be a single token of the LM's tokenizer, got '<unk>'"):
        answer_tokens(fast, QPeftConfig(score="yes_no"))


def test_grades_are_in_order():
    found = answer_tokens(tiny_tokenizer(), QPeftConfig(score="graded", max_grade=9))
    assert [tiny_tokenizer().decode(list(ids)) for ids in found] == list("0123456789")
    assert answer_tokens(tiny_tokenizer(), QPeftConfig()) == ()


@pytest.mark.parametrize(("options", "message"), [
    ({"score": "yes_no"}, "QPeftConfig: yes_words: 'yes' must be a single token of the LM's tokenizer, got 'y', 'e', "
     "'s'; name words of one token"),
    ({"score": "both", "yes_words": "y", "no_words": ("n", "not so")}, "no_words: 'not so' must be a single token"),
    ({"score": "yes_no", "yes_words": "y", "no_words": ("n", "Y")}, "yes_words and no_words both have the token 'Y'"),
    ({"score": "graded", "max_grade": 10}, "max_grade: '10' must be a single token of the LM's tokenizer, "
     "got '1', '0'; use max_grade=9 or less"),
])  # fmt: skip
def test_words_that_cannot_answer(options, message):
    with pytest.raises(ValueError) as error:
        Prompt(tiny_tokenizer(), QPeftConfig(**options))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_is_asked():
    assert asked_text(QPeftConfig()) == ""
    assert [asked_text(QPeftConfig(score=score)) for score in ("yes_no", "both")] == ["Relevant:"] * 2
    assert asked_text(QPeftConfig(score="graded", max_grade=9)) == "Relevance from 0 to 9:"
    assert asked_text(QPeftConfig(score="graded", ask=" Grade: ")) == "Grade:"
    prompt = Prompt(tiny_tokenizer(), QPeftConfig(score="graded"))
    assert tiny_tokenizer().decode(prompt.suffix.asked) == "\nRelevance from 0 to 4:"
    query = prompt.queries(["why tides"])[0]
    assert prompt.suffix.scored(query) == () and prompt.suffix.read(query) == (*query, *prompt.suffix.asked)


def test_an_answer_without_a_row_in_the_embedding_table():
    prompt = Prompt(with_words("yes", "no"), QPeftConfig(score="yes_no"))
    prompt.expect_rows(260)
    with pytest.raises(ValueError, match="has the token 'no' with the id 259, but the LM's embedding table has 259"):
        prompt.expect_rows(259)
