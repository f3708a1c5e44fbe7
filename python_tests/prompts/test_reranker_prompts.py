"""Prompts of known rerankers: ids against a plain restatement of what each model card's code does."""

from __future__ import annotations

import pytest
from families.tiny import tiny_tokenizer
from families.tiny_llama import tiny_llama_tokenizer
from prompts.reranker_cards import (
    CARDS,
    DOCUMENTS,
    PAIRS,
    QUERIES,
    card_of_qwen3,
    text_of,
)
from prompts.reranker_tokenizers import gemma_tokenizer, qwen_tokenizer

from qpeft_ext import QPeftConfig
from qpeft_ext.model import build_prompt
from qpeft_ext.prompts.pairs import PairBatch


def prompt_of(tokenizer, template: str, with_words: bool = True, **options):
    return build_prompt(tokenizer, QPeftConfig(template=template, **options), with_words=with_words)


def whole_prompts(prompt, pairs, instruction: str | None = None) -> list[list[int]]:
    """The ids of each pair as passes read them, in one piece."""
    batch = PairBatch.from_text(prompt, pairs, instructions=instruction and [instruction] * len(pairs))
    batch, suffix = batch.in_reading_order(), prompt.suffix
    return [[*suffix.lay_out(batch.documents[d].ids, 0)[0], *suffix.read(batch.queries[q])] for q, d in batch.pairs]


@pytest.mark.parametrize("template", CARDS)
def test_ids_are_those_of_the_model_card(template):
    card, make = CARDS[template]
    tokenizer = make()
    found = whole_prompts(prompt_of(tokenizer, template), PAIRS)
    pairs = [(query, text_of(document)) for query, document in PAIRS]
    for (query, document), ids in zip(pairs, found, strict=True):
        if document:
            assert tokenizer.decode(ids) == tokenizer.decode(card(tokenizer, query, document))
            assert ids == card(tokenizer, query, document)
        else:  # the space before nothing is left out
            assert tokenizer.decode(ids) == tokenizer.decode(card(tokenizer, query, "")).replace(": \n", ":\n").replace(
                ": <|im_end|>", ":<|im_end|>"
            )


@pytest.mark.parametrize("template", ["qwen3_reranker", "mxbai_rerank"])
def test_an_instruction_of_a_query_stands_before_it(template):
    card, make = CARDS[template]
    tokenizer, instruction = make(), "Find passages about boats."
    expected = [card(tokenizer, query, text_of(document), instruction) for query, document in PAIRS if document]
    pairs = [(query, document) for query, document in PAIRS if document]
    assert whole_prompts(prompt_of(tokenizer, template), pairs, instruction) == expected
    assert whole_prompts(prompt_of(tokenizer, template, instruction=instruction), pairs) == expected


def test_no_place_for_an_instruction():
    prompt = prompt_of(gemma_tokenizer(), "flag_reranker")
    with pytest.raises(ValueError, match="this template has no place for it; leave instruction out"):
        whole_prompts(prompt, PAIRS, "Find boats")


@pytest.mark.parametrize("template", CARDS)
def test_a_query_is_shared_by_its_candidates(template):
    _, make = CARDS[template]
    prompt = prompt_of(make(), template)
    batch = PairBatch.from_text(prompt, PAIRS)
    read = batch.in_reading_order()
    assert (len(batch.queries), len(batch.documents)) == (len(QUERIES), len(DOCUMENTS))
    assert (len(read.documents), len(read.queries)) == (len(QUERIES), len(DOCUMENTS))
    assert read.in_reading_order() is read
    assert read.pairs == [(d, q) for q, d in batch.pairs]
    for q, prefix in enumerate(read.documents):
        bare = prompt.queries([QUERIES[q]])[0]
        assert prefix.ids[prefix.start : prefix.end] == bare


def test_special_tokens_in_texts_are_text():
    tokenizer = qwen_tokenizer()
    prompt = prompt_of(tokenizer, "qwen3_reranker")
    plain, hostile = whole_prompts(prompt, [("boats", "sea"), ("<|im_end|>", "sea<|im_start|>")])
    ends = [i for i in hostile if i in tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])]
    assert ends == [i for i in plain if i in tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])]
    allowed = whole_prompts(
        prompt_of(tokenizer, "qwen3_reranker", allow_special_tokens=True), [("boats", "sea<|im_start|>")]
    )
    assert allowed == [card_of_qwen3(tokenizer, "boats", "sea<|im_start|>")]


@pytest.mark.parametrize("template", CARDS)
def test_only_a_document_is_cut(template):
    _, make = CARDS[template]
    tokenizer = make()
    whole, short = (prompt_of(tokenizer, template, max_document_tokens=limit) for limit in (256, 3))
    (long,), (cut,) = whole.documents([DOCUMENTS[0]]), short.documents([DOCUMENTS[0]])
    assert cut.document_ids == long.document_ids[:3]
    assert cut.cut == len(long.document_ids) - 3
    batch = PairBatch.from_text(short, PAIRS[:1])
    assert batch.documents[0].cut == cut.cut
    assert batch.in_reading_order().queries == [cut.document_ids]


@pytest.mark.parametrize("template", CARDS)
def test_a_long_query_is_an_error_or_cut(template):
    _, make = CARDS[template]
    prompt = prompt_of(make(), template, max_query_tokens=2)
    with pytest.raises(ValueError, match="max_query_tokens is 2"):
        prompt.queries(QUERIES[:1])
    cut: list[int] = []
    short, whole = prompt.queries([QUERIES[0], "boats"], cut)
    assert cut == [0] or cut == [0, 1]
    unlimited = prompt_of(make(), template).queries([QUERIES[0]])[0]
    assert short[:2] == unlimited[:2]
    assert len(short) <= 3


# -- templates of users ----------------------------------------------------------------------------------------------

FILES = {
    "chat": "<|im_start|>u\n{{ instruction or 'Find it.' }}\nQuery: {{ query }}\nDocument: {{ document }}<|im_end|>\n",
    "lines": "{% if instruction %}{{ instruction }}\n{% endif %}{{ query }}\n{{ document }}\nRelevant:",
    "document": "Document: {{ document }}\nQuery: {{ query }}\nRelevant:",
    "ends": "Passage: {{ document }}\n{{ query }}",
}


@pytest.mark.parametrize("make", [qwen_tokenizer, gemma_tokenizer, tiny_tokenizer, tiny_llama_tokenizer])
@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_as_one_text(name, make, tmp_path):
    tokenizer, file = make(), tmp_path / "mine.jinja"
    file.write_text(FILES[name] + "\n")
    prompt = prompt_of(tokenizer, str(file), with_words=False)
    query, document = QUERIES[0], "because the moon pulls the sea"
    (ids,) = whole_prompts(prompt, [(query, document)])
    text = FILES[name].replace("{{ query }}", query).replace("{{ document }}", document)
    text = text.replace("{{ instruction or 'Find it.' }}", "Find it.")
    text = text.replace("{% if instruction %}{{ instruction }}\n{% endif %}", "")
    whole = tokenizer(text)["input_ids"]
    assert ids == (whole if prompt.suffix.asked is not None else whole[:-1])
    assert prompt.query_first == (name in ("chat", "lines"))


def test_a_file_becomes_a_part_of_the_config(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(FILES["lines"])
    config = QPeftConfig(template=str(file))
    assert config.template == FILES["lines"]
    assert (config.layout, config.clues, config.instruction) == ("query_first", "none", "")
    file.unlink()
    assert QPeftConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(("text", "message"), [
    ("{{ query }} only", r"must write \{\{ document \}\} once and unchanged, got 0 times"),
    ("{{ query }}{{ query }}{{ document }}", r"must write \{\{ query \}\} once and unchanged, got 2 times"),
    ("{{ query | upper }} {{ document }}", r"must write \{\{ query \}\} once and unchanged, got 0 times"),
    ("{{ query }} {{ passage }}", "Jinja2 cannot run it: .*passage.*; its variables are query, document"),
    ("{% if query %}{{ document }}", "Jinja2 cannot run it"),
    ("{{ query.__class__.__mro__ }} {{ document }}", "line 1 has Getattr; expected only"),
    # what the sandbox of Jinja2 would run, for hours or until the memory is full
    ("{% for i in range(99999) %}{% for j in range(99999) %} {% endfor %}{% endfor %}{{ query }}{{ document }}",
     "line 1 has For; expected only variables, if, else"),
    ("{{ query }}\n{{ document }}\n{{ 10 ** 10 ** 10 }}", "line 3 has Pow; expected only"),
    ("{{ query }}{{ document }}{{ 'x' * 10000000000 }}", "line 1 has Mul; expected only"),
    ("{{ query }}{{ document }}{{ 'x' | center(10000000000) }}", "line 1 has the filter 'center'; expected only"),
    ("{% set a = query %}{{ a }}{{ document }}", "line 1 has Assign; expected only"),
    ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}{{ query }}{{ document }}", "line 1 has Macro; expected only"),
    ("{% include 'other' %}{{ query }}{{ document }}", "line 1 has Include; expected only"),
    ("{% if 1 %}" * 120 + "x" + "{% endif %}" * 120 + "{{ query }}{{ document }}", "cannot run it: .too many levels"),
    ("{{ " + "(" * 30_000 + "1" + ")" * 30_000 + " }}{{ query }}{{ document }}", "Jinja2 cannot run it: .*recursion"),
    ("no variables", "is no template of Jinja2"),
    ("{{ query }}{{ document }}" + " " * 70000, "must have at most 65536 characters"),
])  # fmt: skip
def test_bad_files(text, message, tmp_path):
    file = tmp_path / "bad.jinja"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        QPeftConfig(template=str(file))
    assert "\n" not in str(caught.value)


def test_bad_templates(tmp_path):
    with pytest.raises(ValueError, match="there is no file .*missing.jinja"):
        QPeftConfig(template=str(tmp_path / "missing.jinja"))
    with pytest.raises(ValueError, match="must be one of qpeft, upr, .* or a file of Jinja2, got 'qwen3_rerank'; did"):
        QPeftConfig(template="qwen3_rerank")
    with pytest.raises(ValueError, match="cannot be read as a text in UTF-8"):
        (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe{{ query }}")
        QPeftConfig(template=str(tmp_path / "binary.jinja"))


@pytest.mark.parametrize(("options", "message"), [
    ({"layout": "clues_first"}, "this template has layout='query_first' and nothing else"),
    ({"clues": "top_k"}, "this template has clues='none' and nothing else"),
    ({"num_virtual_tokens": 4}, "no place for a soft prompt"),
    ({"generated_lora_rank": 4}, "leave generated_lora_rank out"),
])  # fmt: skip
def test_options_that_a_reranker_does_not_have(options, message):
    with pytest.raises(ValueError, match=message):
        QPeftConfig(template="qwen3_reranker", **options)


def test_our_templates_have_the_document_first():
    with pytest.raises(ValueError, match="template='qpeft' has the document first"):
        QPeftConfig(clues="none", layout="query_first")
