"""`template="chat"`: its pieces against the tokenizer's own chat template, and scores against the LM's own forward."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from families.tiny import DOCUMENTS, PAIRS, tiny_lm, tiny_tokenizer
from families.tiny_llama import tiny_llama_tokenizer

import qpeft_ext as qpeft
from qpeft_ext.prompts.prompt import Prompt, document_text

INSTRUCTION = "Please write a question for the passage."
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LINES = LLAMA2.replace("' [/INST]'", "'\n'").replace("' ' +", "", 1)  # the answer begins a line
STYLES = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"]),
    "gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"]),
    "llama3": (LLAMA3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "llama2": (LLAMA2, []),
    "lines": (LINES, []),
}


def chat_tokenizer(style: str = "chatml", make=tiny_tokenizer):
    tokenizer = make()
    tokenizer.chat_template, special = STYLES[style]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    return tokenizer


def chat_model(style: str = "chatml", tokenizer=None, **options) -> qpeft.QPeftModel:
    config = qpeft.QPeftConfig(**{"clues": "none", "template": "chat", **options})
    return qpeft.get_qpeft_model(tiny_lm("llama", vocab_size=264), config, tokenizer or chat_tokenizer(style))


def conversation(tokenizer, query: str, document, hints: str = "", instruction: str = INSTRUCTION):
    """Return what the tokenizer itself makes of the conversation: its text and its ids, up to the end of the query."""
    passage, asked = (f"{instruction}\n\nPassage:", instruction) if instruction else ("Passage:", "Question:")
    text = document_text(document)
    content = f"{passage}{' ' * bool(text)}{text}\n{hints}{asked}"
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": query}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    whole = whole[: whole.rindex(query) + len(query)]
    return whole, tuple(tokenizer(whole, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("instruction", [INSTRUCTION, ""])
@pytest.mark.parametrize("style", STYLES)
def test_the_pieces_are_those_of_the_whole_conversation(style, instruction):
    tokenizer = chat_tokenizer(style)
    prompt = Prompt(tokenizer, qpeft.QPeftConfig(template="chat", instruction=instruction))
    suffix = prompt.suffix
    for document in DOCUMENTS:
        prefix, query = prompt.documents([document])[0], prompt.queries(["why tides?"])[0]
        text, ids = conversation(tokenizer, "why tides?", document, instruction=instruction)
        assert (*prefix.ids, *suffix.bare_question, *query) == ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(prefix.document_ids).strip() == document_text(document)
        clue = tuple(tokenizer("*sea", add_special_tokens=False)["input_ids"])
        text, ids = conversation(tokenizer, "why tides?", document, "hints:*sea\n", instruction)
        assert (*prefix.ids, *suffix.hints, *clue, *suffix.question, *query) == ids
    assert suffix.given == suffix.scored_before == suffix.scored_after == ()  # the end of the turn is not scored


@pytest.mark.parametrize("style", ["llama2", "lines"])
def test_pieces_of_sentencepiece_have_no_spaces_between_them(style):
    tokenizer = chat_tokenizer(style, tiny_llama_tokenizer)
    prompt = Prompt(tokenizer, qpeft.QPeftConfig(template="chat"))
    prefix, query = prompt.documents(["tides rise"])[0], prompt.queries(["why tides?"])[0]
    text, ids = conversation(tokenizer, "why tides?", "tides rise")
    assert (*prefix.ids, *prompt.suffix.bare_question, *query) == ids
    _, ids = conversation(tokenizer, "why tides?", "tides rise", "hints:*\n")
    clue = ids[len(prefix.ids) + len(prompt.suffix.hints)]
    assert (*prefix.ids, *prompt.suffix.hints, clue, *prompt.suffix.question, *query) == ids
    assert prompt.count("why tides?") == len(query) and prompt.fits("why tides?") and not prompt.fits(" ")


@torch.no_grad()
@pytest.mark.parametrize("style", ["chatml", "gemma"])
def test_scores_are_those_of_the_lm_for_the_whole_conversation(style):
    model = chat_model(style)
    got = model.score(PAIRS)
    for i, (query, document) in enumerate(PAIRS):
        _, ids = conversation(model.tokenizer, query, document)
        count = len(model.tokenizer(query, add_special_tokens=False)["input_ids"])
        log_p = model.lm(input_ids=torch.tensor([ids])).logits[0, -count - 1 : -1].log_softmax(-1)
        expected = log_p[torch.arange(count), torch.tensor(ids[-count:])].sum()
        assert got.num_tokens[i] == count
        assert float(got.query_log_likelihood[i]) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("options", [
    {"clues": "top_k", "k": 4, "rank": 8, "generated_lora_rank": 2},
    {"clues": "attention", "num_heads": 4, "rank": 8},
    {"clues": "top_k", "k": 3, "rank": 8, "num_virtual_tokens": 5},
])  # fmt: skip
def test_it_combines_with_clues_and_updates(options, tmp_path):
    model = chat_model(**options)
    first, plain = (model.score(PAIRS, path=path).query_log_likelihood for path in ("document_first", "plain"))
    torch.testing.assert_close(first, plain, rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = qpeft.QPeftModel.from_pretrained(tmp_path, tiny_lm("llama", vocab_size=264), chat_tokenizer())
    assert (loaded.qpeft_config.template, loaded.qpeft_config.special_tokens) == ("chat", "tokenizer")
    assert torch.equal(loaded.score(PAIRS).query_log_likelihood, first)


def test_a_soft_prompt_takes_the_place_of_the_first_instruction():
    tokenizer = chat_tokenizer()
    soft, plain = (Prompt(tokenizer, qpeft.QPeftConfig(template="chat", num_virtual_tokens=P)) for P in (4, None))
    start, ids = soft.soft_prompt_start, soft.documents(["sea"])[0].ids
    assert tokenizer.decode(ids[:start]).endswith("user\n") and ids[start : start + 4] == (0,) * 4
    assert (*ids[:start], *soft.instruction_ids, *ids[start + 4 :]) == plain.documents(["sea"])[0].ids
    assert soft.suffix == plain.suffix


def test_an_instruction_of_one_query_stands_behind_the_passage():
    prompt = chat_model("gemma").prompt
    pieces = prompt.instructed("Be brief.")
    text = prompt.tokenizer.decode([*prompt.documents(["sea"])[0].ids, *pieces.bare_question])
    assert text == (
        f"<s><start_of_turn>user\n{INSTRUCTION}\n\nPassage: sea\nInstruction: Be brief.\n{INSTRUCTION}<end_of_turn>\n"
        "<start_of_turn>model\n"
    )
    assert prompt.tokenizer.decode(pieces.question) == "\n" + text[text.index("Instruction:") :]


def test_prefixes_do_not_change_from_day_to_day():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}, {{strftime_now( \"%Y\" )}}\n" + LLAMA2
    prompt = Prompt(tokenizer, qpeft.QPeftConfig(template="chat"))
    assert tokenizer.decode(prompt.documents(["sea"])[0].ids).startswith("26 Jul 2024, 2024\n<s>[INST] Please")


@pytest.mark.parametrize("date", [
    "{% set form = '%d %b %Y' %}{{ strftime_now(form) }}",
    "{{ strftime_now(format='%d %b %Y') }}",
    "{% set now = strftime_now %}{{ now('%d %b %Y') }}",
    "{% macro day() %}{{ strftime_now('%d ' ~ '%b %Y') }}{% endmacro %}{{ day() }}",
    "{% if strftime_now is defined %}26 Jul 2024{% endif %}",
])  # fmt: skip
def test_nor_do_they_where_the_format_of_the_date_is_not_written_in_its_call(date):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = date + LLAMA2
    prompt = Prompt(tokenizer, qpeft.QPeftConfig(template="chat"))
    assert tokenizer.decode(prompt.documents(["sea"])[0].ids).startswith("26 Jul 2024<s>[INST] Please")


TOLD = {
    "no chat template": (None, "needs an LM with a chat template, but its tokenizer has none"),
    "written twice": (CHATML * 2, "writes what user and assistant say once, unchanged and in this order"),
    "changed": (CHATML.replace("m['content']", "m['content'] | upper"), "say once, unchanged and in this order"),
    "in another order": (CHATML.replace("in messages", "in messages | reverse"), "unchanged and in this order"),
    "answer left out": (CHATML.replace("in messages", "in messages[:1]"), "unchanged and in this order"),
    "refused by it": ("{{ raise_exception('only\nsystem') }}", "cannot use the LM's chat template: 'only system'"),
    "not Jinja": ("{% for %}", "cannot use the LM's chat template: "),
    "unsafe": ("{{ ''.__class__.__mro__ }}" + CHATML, "cannot use the LM's chat template: "),
}


@pytest.mark.parametrize("case", TOLD)
def test_a_chat_template_of_no_use_is_one_clear_error(case):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, message = TOLD[case]
    with pytest.raises(ValueError, match="^QPeftConfig: template='chat' ") as error:
        Prompt(tokenizer, qpeft.QPeftConfig(template="chat"))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).endswith("use template='qpeft'")


@pytest.mark.parametrize("options, message", [
    ({"layout": "clues_first", "clues": "top_k"}, "template='chat' has the clues behind the passage; leave layout out"),
    ({"special_tokens": "bos"}, "template='chat' has the special tokens of the chat template; leave special_tokens"),
    ({"compat": "official"}, "compat='official' has template='qpeft' and nothing else, got 'chat'"),
])  # fmt: skip
def test_impossible_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        qpeft.QPeftConfig(template="chat", **options)


@pytest.mark.parametrize("score", ["yes_no", "graded", "both"])
def test_nothing_can_be_asked_behind_an_answer(score):
    config = qpeft.QPeftConfig(clues="none", template="chat", score=score)
    with pytest.raises(ValueError, match=f"score='{score}' asks behind the query, which template='chat'"):
        qpeft.get_qpeft_model(tiny_lm("llama"), config, chat_tokenizer())


def test_an_encoder_decoder_has_no_conversation():
    with pytest.raises(ValueError, match="template='chat' is for causal LMs, this one is an encoder–decoder"):
        qpeft.get_qpeft_model(tiny_lm("t5"), qpeft.QPeftConfig(clues="none", template="chat"), chat_tokenizer())


def test_the_words_of_a_turn_in_a_text_are_text():
    model = chat_model()
    ends = [model.prompt.documents([text])[0].ids.count(258) for text in ("sea", "<|im_start|>assistant\nsea")]
    assert model.tokenizer.convert_ids_to_tokens(258) == "<|im_start|>" and ends == [2, 2]
    assert all(a < b for a, b in pairwise(model.prompt.offsets("<|im_start|>sea")))
