"""Queries that an LM writes, against a slow restatement: one token after the other, without a cache."""

import math
import random

import pytest
import torch
from families.tiny import DOCUMENTS, tiny_lm, tiny_tokenizer
from synthesis.word_tokenizer import WORDS, word_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import qpeft_ext as qpeft
from qpeft_ext.synthesis.generator import GeneratedQuery, QueryGenerator, Sampling

KEYS = ["a", "b", "c", "d"]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def generator(family="llama", tokenizer=None, max_tokens_per_batch=None, lm=None, **sampling):
    config = qpeft.QPeftConfig(clues="none")
    model = qpeft.get_qpeft_model(lm or tiny_lm(family), config, tokenizer or tiny_tokenizer())
    options = {"max_new_tokens": 10, "queries_per_document": 2, "seed": 3} | sampling
    return QueryGenerator(model, Sampling(**options), max_tokens_per_batch)


@torch.no_grad()
def slow_tokens(model, document, sampling, key, number):
    """One token after the other from whole prompts, without a cache, drawn as the docstrings say."""
    prompt = model.prompt
    ids = [*prompt.documents([document])[0].ids, *prompt.suffix.bare_question]
    draw, new = random.Random(f"{sampling.seed} {number} {key}"), []
    ends = (
        [1]
        + [model.tokenizer.convert_tokens_to_ids("Ċ")]
        + [  # </s> and the bytes that end a line
            model.tokenizer(chr(code), add_special_tokens=False)["input_ids"][0] for code in (11, 12, 13, 28, 29, 30)
        ]
    )
    while len(new) < sampling.max_new_tokens and not (new and new[-1] in ends):
        logits = model.lm(torch.tensor([ids + new])).logits[0, -1].double()
        if not sampling.temperature:
            new.append(int(logits.argmax()))
            continue
        p = (logits / sampling.temperature).softmax(-1)
        order = p.sort(descending=True).indices[: sampling.top_k or None]
        nucleus, total = [], 0.0
        whole = float(p[order].sum())
        for i in order.tolist():  # the likeliest until their share reaches top_p, at least one
            if nucleus and total >= sampling.top_p * whole:
                break
            nucleus.append(i)
            total += float(p[i])
        number_drawn, below = draw.random() * total, 0.0
        for i in sorted(nucleus):
            below += float(p[i])
            if below > number_drawn:
                break
        new.append(i)
    return new


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"top_p": 0.5, "temperature": 0.7},
        {"top_k": 5},
        {"top_p": 1.0},
        {"temperature": 0.0, "queries_per_document": 1},
    ],
)
def test_tokens_are_those_of_a_slow_loop(sampling):
    write = generator(**sampling)
    for key, document, queries in zip(KEYS, DOCUMENTS, write(KEYS, DOCUMENTS), strict=True):
        for number, query in enumerate(queries):
            assert query == _scored(write, document, slow_tokens(write.model, document, write.sampling, key, number))


def _scored(write, document, tokens):
    query = write._query(tokens)
    if query.text and write.model.prompt.fits(query.text):
        score = write.model(write.model.encode([(query.text, document)]), path="plain").mean_query_log_likelihood
        query = GeneratedQuery(query.text, query.ended, pytest.approx(float(score), abs=1e-5), query.num_tokens)
    return query


@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma3", "bloom", "mamba"])
def test_queries_do_not_depend_on_the_batch(family):
    """Left padding, windows, recurrent state; alone, all together, and in another order."""
    write = generator(family)

    def texts(keys):
        documents = [DOCUMENTS[KEYS.index(key)] for key in keys]
        rows = write(keys, documents)
        return {key: [(query.text, query.ended) for query in queries] for key, queries in zip(keys, rows, strict=True)}

    whole = texts(KEYS)
    assert texts(KEYS[::-1]) == whole == {key: texts([key])[key] for key in KEYS}
    assert len({text for queries in whole.values() for text, _ in queries if text}) > 4
    assert generator(family, seed=4)(["a"], DOCUMENTS[:1])[0] != write(["a"], DOCUMENTS[:1])[0]


def test_the_lms_own_settings_do_not_matter():
    """What a generation_config.json may say: other sampling, penalties, beams."""
    lm = tiny_lm("llama")
    lm.generation_config.update(
        do_sample=True,
        temperature=0.1,
        top_k=1,
        repetition_penalty=5.0,
        num_beams=3,
        no_repeat_ngram_size=1,
        min_length=300,
        max_length=400,
    )
    assert generator(lm=lm)(KEYS, DOCUMENTS) == generator()(KEYS, DOCUMENTS)


def test_several_end_tokens():
    lm = tiny_lm("llama")
    lm.generation_config.eos_token_id = [1, 77]
    write = generator(lm=lm)
    assert write.has_end and write._ends[[1, 77]].all() and not write._ends[78]
    assert write._query([70, 71, 77]) == write._query([70, 71, 1]) != write._query([70, 71, 78])


def test_out_of_memory_halves_the_batch(monkeypatch, caplog):
    write = generator()
    expected, whole, seen = write(KEYS, DOCUMENTS), QueryGenerator._continue, []

    def little(self, prompts, seeds):
        seen.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError
        return whole(self, prompts, seeds)

    monkeypatch.setattr(QueryGenerator, "_continue", little)
    assert [[q.text for q in queries] for queries in write(KEYS, DOCUMENTS)] == [
        [q.text for q in queries] for queries in expected
    ]
    assert seen == [8, 4, 2, 2, 4, 2, 2] and "out of memory: generating 4 prompts at a time" in caplog.text


def test_batches():
    write = generator(max_tokens_per_batch=2 * 2 * (80 + 10 + 10))
    documents = ["x" * n for n in (5, 30, 7, 0, 30)]
    batches = write.batches(documents)
    assert sorted(place for batch in batches for place in batch) == [0, 1, 2, 3, 4] and batches[0][0] in (1, 4)
    lengths = [len(prefix.ids) + len("Question:") + 10 for prefix in write.model.prompt.documents(documents)]
    assert all(len(batch) == 1 or 2 * len(batch) * max(lengths[i] for i in batch) <= 400 for batch in batches)
    with pytest.raises(ValueError, match="does not fit the LM's context of 512; lower max_document_tokens"):
        generator(max_new_tokens=500).batches(["x"])


def test_a_query_ends_with_its_line():
    write = generator()
    for text, expected, ended in [
        (" why tides?\n", "why tides?", True),
        (" why  tides\t", "why tides", False),
        ("\n", "", True),
        (" a</s>", "a", True),
        (" a\r", "a", True),
        ("", "", False),
    ]:
        query = write._query(write.model.tokenizer(text, add_special_tokens=False)["input_ids"])
        assert (query.text, query.ended) == (expected, ended), text


def test_a_tokenizer_without_spaces():
    """As the demo's: the pieces are set apart."""
    tokenizer = word_tokenizer()
    assert generator(tokenizer=tokenizer)._query([2, 3, 4]).text == "tide moon sea"
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *WORDS])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert tokenizer.decode([1, 2]) == "tidemoon"
    assert generator(tokenizer=tokenizer)._query([2, 3]).text == "moon sea"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"queries_per_document": 0}, "queries_per_document must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
        ({"temperature": math.nan}, "temperature must be 0 or above, got nan"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 5e-324}, "temperature must be 0 or at least 1e-06, got 5e-324; use 0"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, got 0"),
        ({"top_p": 1.1}, "top_p"),
        ({"temperature": 0, "queries_per_document": 2}, "temperature 0 writes the same query each time"),
    ],
)
def test_impossible_sampling(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
