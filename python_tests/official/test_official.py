"""`compat="official"` against an independent restatement of the official code, and what of that code is refused."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from families.tiny import tiny_lm, tiny_tokenizer
from families.tiny_llama import tiny_llama, tiny_llama_tokenizer
from official.restatement import Official, Refused

import qpeft_ext as qpeft
from qpeft_ext.engine.rows import assemble_rows
from qpeft_ext.official.clues import allowed_pieces
from qpeft_ext.official.likelihood import count_uncertain_tokens
from qpeft_ext.utils.optional import import_bm25s

QUERIES = ["why is the tide high?", "boats", "the moon"]
DOCUMENTS = [
    "the tide is the sea that the moon pulls, 2 times a day",
    {"title": "Boat", "text": "boats bathe in the sea; über 潮, a_b_c the harbour holds them all, more than 3 of them"},
    "dull words, no such thing about any of it",
]
PAIRS = [(QUERIES[q], DOCUMENTS[d]) for q, d in [(0, 0), (1, 1), (0, 1), (2, 0), (2, 2), (1, 2)]]
LETTERS = {"q": "query_tokens", "s": "stop_words", "a": "non_alphabetic"}


def text_of(document) -> str:
    return document if isinstance(document, str) else f"{document['title']} {document['text']}"


def official_model(clues: str = "top_k", moved: bool = True, **options) -> qpeft.QPeftModel:
    config = qpeft.QPeftConfig(**{"clues": clues, "compat": "official", "k": 5, "num_heads": 2} | options)
    model = qpeft.get_qpeft_model(tiny_llama(), config, tiny_llama_tokenizer())
    torch.manual_seed(1)
    for parameter in model.clues.parameters() if moved and model.clues else ():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def restated(model: qpeft.QPeftModel) -> Official:
    """The restatement with the parameters of a model."""
    config, weights = model.qpeft_config, {}
    if model.clues is not None:
        p = dict(model.clues.named_parameters())
        weights = {
            "table": p["embeddings.weight"],
            "w1": p["mlp.0.weight"],
            "b1": p["mlp.0.bias"],
            "w2": p["mlp.2.weight"],
            "b2": p["mlp.2.bias"],
        }
    if config.clues == "attention":
        weights |= {
            "in_weight": p["attention.in_proj_weight"],
            "in_bias": p["attention.in_proj_bias"],
            "out_weight": p["attention.out_proj.weight"],
            "out_bias": p["attention.out_proj.bias"],
        }
    return Official(
        model.lm, model.tokenizer, weights, {"none": 0, "top_k": 3, "attention": 4}[config.clues], config.k,
        config.num_heads, "d" + "".join(letter for letter, name in LETTERS.items() if name in config.filters),
        {"document_first": "suffix", "clues_first": "prefix"}[config.layout], config.similarity == "cosine",
        config.max_document_tokens, frozenset(import_bm25s("bm25s.stopwords").STOPWORDS_EN_PLUS),
        config.instruction)  # fmt: skip


def clue_ids(model, query: str, document) -> list[int]:
    ids = model.compute_clues(model.encode([(query, document)]), explain=True).explanation["clue_ids"][0]
    assert ids[: len(model.clues.hints)].eq(-1).all() and ids[-len(model.clues.newline) :].eq(-1).all()
    return ids[ids >= 0].tolist()


def expected_ids(model, query: str, document) -> list[int]:
    oracle = restated(model)
    return oracle.hints(oracle.ids(query), oracle.document_part(text_of(document)))


# -- scores and gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["document_first", "clues_first"])
@pytest.mark.parametrize("options", [
    {"clues": "top_k"},
    {"clues": "top_k", "similarity": "dot", "filters": ("query_tokens", "stop_words", "non_alphabetic"), "k": 7},
    {"clues": "top_k", "max_document_tokens": 20},
    {"clues": "attention"},
    {"clues": "attention", "filters": ("query_tokens", "stop_words", "non_alphabetic"), "max_document_tokens": 20},
], ids=str)  # fmt: skip
def test_scores_and_gradients_are_those_of_the_restatement(options, layout):
    model = official_model(layout=layout, **options).train()
    oracle, weights = restated(model), torch.linspace(-1, 1, len(PAIRS))
    assert bool(model.engine.why_plain) == (layout == "clues_first")
    expected = [oracle.score(query, text_of(document)) for query, document in PAIRS]
    means, sums = (torch.stack(column) for column in zip(*expected, strict=True))
    (means * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.clues.named_parameters()}
    assert all(gradient.norm() > 0 for gradient in gradients.values())
    largest = max(float(gradient.norm()) for gradient in gradients.values())
    for path in ("plain", "document_first"):
        model.zero_grad()
        scores = model(model.encode(PAIRS), path=path)
        torch.testing.assert_close(scores.mean_query_log_likelihood, means, rtol=0, atol=1e-5)
        torch.testing.assert_close(scores.query_log_likelihood, sums, rtol=1e-5, atol=1e-5)
        (scores.mean_query_log_likelihood * weights).sum().backward()
        for name, parameter in model.clues.named_parameters():
            assert float((parameter.grad - gradients[name]).norm()) <= 1e-5 * largest, name
    assert scores.num_tokens.tolist() == [len(oracle.ids(query)) + 2 for query, _ in PAIRS]
    assert means.std() > 0.05  # otherwise a wrong document could not be seen


def test_without_clues_it_is_the_official_prompt_alone():
    model = official_model("none")
    oracle = restated(model)
    for (query, document), score in zip(PAIRS, model.score(PAIRS).query_log_likelihood, strict=True):
        assert float(score) == pytest.approx(float(oracle.score(query, text_of(document))[1]), abs=1e-4)


def test_the_prompt_reads_as_the_official_one():
    model = official_model()
    (prefix,), (query,) = model.prompt.documents([DOCUMENTS[1]]), model.prompt.queries([QUERIES[1]])
    text = model.tokenizer.decode
    question, soft = model.prompt.suffix.question, model.qpeft_config.instruction
    assert soft == "given the hints, please generate a question for the input passage"
    assert text(prefix.ids) == f"<s> {soft} Passage: {text_of(DOCUMENTS[1])} \n"
    assert text(question) == "Question: \n" and text(model.prompt.suffix.scored(query)) == "<s> boats</s>"
    assert text(model.clues.hints.tolist()) == "hints: " and text(model.clues.newline.tolist()) == "\n"


@pytest.mark.parametrize("limit", [5, 6, 12, 47, 48, 300])
def test_the_head_of_a_long_document_is_cut(limit):
    model = official_model(max_document_tokens=limit)
    expected, whole = (restated(m).document_part(DOCUMENTS[0]) for m in (model, official_model()))
    prefix = model.prompt.documents([DOCUMENTS[0]])[0]
    assert [*prefix.document_ids, *model.prompt.suffix.question] == expected
    assert prefix.cut == len(whole) - len(expected) == max(0, len(whole) - limit)
    assert prefix.ids[: prefix.start] == (1, *restated(model).ids(model.qpeft_config.instruction))


# -- the choice of clues -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("letters", ["", "q", "s", "a", "qsa"])
def test_the_clues_are_those_of_the_restatement(letters, similarity):
    filters = tuple(LETTERS[letter] for letter in letters)
    for moved in (True, False):  # not moved: all document tokens that stand in the query are as similar as can be
        model = official_model(filters=filters, similarity=similarity, moved=moved, k=8)
        for query, document in PAIRS:
            assert clue_ids(model, query, document) == expected_ids(model, query, document)


def test_all_that_could_be_clues_are_in_order():
    """Those that are unlike every query token too, before the query's own."""
    model = official_model()
    oracle = restated(model)
    for query, document in [("boats", "sea"), ("the", "dull"), *PAIRS]:
        expected = oracle.survivors(oracle.ids(query), oracle.document_part(text_of(document)))
        model.clues.k = len(expected)
        assert clue_ids(model, query, document) == expected


def test_pairs_together_have_the_clues_of_pairs_alone():
    model = official_model(k=8)
    found = model.compute_clues(model.encode(PAIRS), explain=True).explanation["clue_ids"]
    for row, (query, document) in zip(found, PAIRS, strict=True):
        assert row[row >= 0].tolist() == clue_ids(model, query, document)
    together, alone = (model.score(PAIRS, deterministic=flag).query_log_likelihood for flag in (False, True))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)
    assert torch.equal(alone, torch.cat([model.score([p], deterministic=True).query_log_likelihood for p in PAIRS]))


def test_words_of_the_template_become_clues():
    model = official_model(k=10)
    pieces = {
        piece
        for query, document in PAIRS
        for piece in model.tokenizer.convert_ids_to_tokens(clue_ids(model, query, document))
    }
    assert pieces & {"▁Pass", "age", "▁Question", ":"}


def test_the_query_leaks_into_the_clues_of_a_short_document():
    query, document = QUERIES[0], "sea"
    model = official_model(k=15)
    chosen = clue_ids(model, query, document)
    assert chosen == expected_ids(model, query, document)
    part = restated(model).document_part(document)
    leaked = [token for token in chosen if token not in part]
    asked = list(model.prompt.queries([query])[0])
    assert leaked and leaked == list(dict.fromkeys(t for t in asked if t not in part))[: len(leaked)]
    default = qpeft.get_qpeft_model(tiny_llama(), qpeft.QPeftConfig(clues="top_k", k=15), tiny_llama_tokenizer())
    batch = default.encode([(query, document)])
    ids = default.compute_clues(batch, explain=True).explanation["clue_ids"][0]
    assert set(ids[ids >= 0].tolist()) == set(batch.documents[0].document_ids)  # "▁sea": one clue, and no query token


def test_only_the_best_thousand_are_looked_at():
    """A long query and document: 1000 of the pairs (query token, position) are all there is to choose from."""
    query, document = " ".join(QUERIES * 3), " ".join(text_of(d) for d in DOCUMENTS)
    model = official_model(max_query_tokens=100)
    oracle = restated(model)
    asked, part = oracle.ids(query), oracle.document_part(document)
    expected = oracle.survivors(asked, part)
    assert len(asked) * len(part) > 3000 and 10 < len(expected) < len({*asked, *part})
    model.clues.k = len(expected)
    assert clue_ids(model, query, document) == expected
    model.clues.k += 1
    with pytest.raises(ValueError, match="at random"):
        clue_ids(model, query, document)


def test_without_survivors_no_filter_is_in_force():
    query = "Passage: Question: \n sea"
    model = official_model(k=9, filters=("query_tokens",))
    chosen = clue_ids(model, query, "sea")
    assert chosen == expected_ids(model, query, "sea")
    asked = model.prompt.queries([query])[0]
    assert set(chosen) <= set(asked) and len(set(chosen)) < 9  # the filter would leave none; tokens repeat
    long = official_model(k=90, filters=("query_tokens",))  # more than there are of the document: without <s> and </s>
    assert clue_ids(long, query, "sea") == expected_ids(long, query, "sea")


def test_filters_have_their_faults():
    tokenizer = tiny_llama_tokenizer()

    def passing(*names: str) -> list[str]:
        pieces = ["▁the", "the", "▁is", "▁moon", "<0x0A>", "2", "▁", ",", "_", "<s>", "</s>", "<unk>"]
        allowed = allowed_pieces(tokenizer, len(tokenizer) + 3, names)
        return [piece for piece in pieces if allowed[tokenizer.convert_tokens_to_ids(piece)]]

    everything = ["▁the", "the", "▁is", "▁moon", "<0x0A>", "2", "▁", ",", "_", "<unk>"]
    assert passing() == everything
    assert passing("stop_words") == [piece for piece in everything if piece != "the"]
    assert passing("non_alphabetic") == ["▁the", "the", "▁is", "▁moon", "<0x0A>", "<unk>"]


def test_attention_equals_multihead_attention_over_what_is_left():
    model = official_model("attention", filters=("query_tokens", "non_alphabetic"))
    oracle = restated(model)
    batch = model.encode(PAIRS)
    with torch.no_grad():
        found = model.compute_clues(batch, explain=True)
        for i, (query, document) in enumerate(PAIRS):
            part, asked = oracle.document_part(text_of(document)), oracle.ids(query)
            expected = torch.stack(oracle.hint_vectors(asked, part))
            torch.testing.assert_close(found.embeds[i][found.mask[i]], expected, rtol=1e-5, atol=1e-5)
            read = found.explanation["weights"][i].sum((0, 1)) > 0
            seen = [not oracle.is_filtered(token, asked, "qa") for token in part]
            length = len(part) - 4  # then padding, then "Question: \n"
            assert read[:length].tolist() == seen[:length] and read[-4:].tolist() == seen[-4:]


# -- what is refused ---------------------------------------------------------------------------------------------


def test_random_clues_are_refused_and_the_pair_is_named():
    model = official_model(k=40)
    with pytest.raises(Refused):
        expected_ids(model, "boats", "sea")
    with pytest.raises(ValueError, match=r"query 'boats' and document 'Passage: sea \\n': fewer than k=40 .* random"):
        model.score([("boats", "sea")])
    assert torch.isfinite(official_model(k=5).score([("boats", "sea")]).query_log_likelihood).all()


def test_an_attention_without_keys_is_refused():
    model, query = official_model("attention", filters=("query_tokens",)), "Passage: Question: \n sea"
    with pytest.raises(Refused):
        restated(model).score(query, "sea")
    with pytest.raises(ValueError, match=r"and document 'Passage: sea \\n': the filters leave no token .* NaN"):
        model.score([("boats", "moon"), (query, "sea")])


def test_the_mean_leaves_out_what_is_predicted_with_certainty():
    model = official_model()
    head, table = model.lm.lm_head.weight, model.lm.get_input_embeddings().weight
    last = model.prompt.suffix.question[-1]  # the newline before <s>
    with torch.no_grad():  # the LM hands its input on, and answers a newline with <s>
        for layer in model.lm.get_decoder().layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        head[1] = 1000 * table[last]
        scores, oracle = model.score(PAIRS), restated(model)
        for i, (query, document) in enumerate(PAIRS):
            mean, total = oracle.score(query, text_of(document))
            tokens = len(oracle.ids(query)) + 2
            assert int(scores.num_tokens[i]) == tokens - 1 == round(float(total / mean))
            assert float(scores.mean_query_log_likelihood[i]) == pytest.approx(float(mean), rel=1e-5)
        ranked = qpeft.Reranker(model).predict(PAIRS)
        assert ranked == pytest.approx(scores.mean_query_log_likelihood.numpy(), rel=1e-5)


def test_a_mean_over_nothing_is_refused():
    model = official_model()
    batch = model.encode([("boats", "sea")])
    laid_out = assemble_rows(batch, model.prompt.suffix, [0], model.device, with_prefix=True)
    log_p = torch.zeros(len(laid_out.target_ids))
    with pytest.raises(ValueError, match="query 'boats': every token is predicted with certainty"):
        count_uncertain_tokens(log_p, laid_out.sum_of_each_pair, batch, model.tokenizer.decode)
    log_p[2] = -1.0
    assert count_uncertain_tokens(log_p, laid_out.sum_of_each_pair, batch, model.tokenizer.decode).tolist() == [1]


def test_other_tokenizers_are_refused():
    config = qpeft.QPeftConfig(clues="top_k", compat="official")
    with pytest.raises(ValueError, match="needs a Llama tokenizer with <s> = 1 and </s> = 2, got bos_token_id 0"):
        qpeft.get_qpeft_model(tiny_lm("llama"), config, tiny_tokenizer())
    other = tiny_llama_tokenizer()
    state = json.loads(other.backend_tokenizer.to_str())
    state["model"]["merges"] = [pair for pair in state["model"]["merges"] if pair[0] != "▁Questio"]
    other = transformers.PreTrainedTokenizerFast(
        tokenizer_object=type(other.backend_tokenizer).from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>"
    )
    with pytest.raises(ValueError, match="ends with four pieces for 'Question: .n', got .'n', ':'"):
        qpeft.get_qpeft_model(tiny_llama(), config, other)


@pytest.mark.parametrize("pair, what", [(("a <s> b", "sea"), "query"), (("boats", "a <s> b"), "document")])
def test_a_bos_in_a_text_is_refused(pair, what):
    with pytest.raises(ValueError, match=f"{what} 'a <s> b' has the token <s> in its text"):
        official_model().score([pair])


@pytest.mark.parametrize("options, message", [
    ({"rank": 64}, "compat='official' has rank=None and nothing else, got 64; leave rank out"),
    ({"clue_embeddings": "low_rank"}, "has clue_embeddings='full' and nothing else, got 'low_rank'"),
    ({"source": "vocabulary"}, "has source='document' and nothing else"),
    ({"selection": "random"}, "has selection='similarity' and nothing else"),
    ({"score_gate": True}, "has score_gate=False and nothing else"),
    ({"generated_lora_rank": 4}, "has generated_lora_rank=None and nothing else"),
    ({"clues": "attention", "attention_bias": False}, "has attention_bias=True and nothing else"),
    ({"max_document_tokens": 4}, "of compat='official', which counts its template, must be at least 5"),
    ({"compat": "offical"}, "compat must be one of none, official, got 'offical'; did you mean 'official'"),
])  # fmt: skip
def test_what_it_does_not_have_is_an_error(options, message):
    with pytest.raises(ValueError) as error:
        qpeft.QPeftConfig(**{"clues": "top_k", "compat": "official"} | options)
    assert str(error.value).startswith("QPeftConfig: ") and message in str(error.value)


# -- the rest of the package -------------------------------------------------------------------------------------


@pytest.mark.parametrize("clues", ["top_k", "attention", "none"])
def test_an_adapter_comes_back_to_the_bit(clues, tmp_path):
    model = official_model(clues, layout="document_first" if clues == "none" else "clues_first")
    model.save_pretrained(tmp_path)
    loaded = qpeft.QPeftModel.from_pretrained(tmp_path, tiny_llama(), tiny_llama_tokenizer())
    assert loaded.qpeft_config == model.qpeft_config and loaded.qpeft_config.compat == "official"
    assert torch.equal(loaded.score(PAIRS).query_log_likelihood, model.score(PAIRS).query_log_likelihood)


@pytest.mark.parametrize("clues", ["top_k", "attention"])
def test_reranking_shares_prefixes_and_explains(clues):
    model, cache = official_model(clues), qpeft.DocumentCache()
    reranker = qpeft.Reranker(model, cache=cache)
    cold = reranker.predict(PAIRS)
    assert len(cache) == len(DOCUMENTS) and cold == pytest.approx(reranker.predict(PAIRS), abs=1e-5)
    assert cold == pytest.approx(model.score(PAIRS, path="plain").mean_query_log_likelihood.numpy(), abs=1e-5)
    document = {"title": "Boat", "text": " boats in the sea"}
    found = reranker.explain(QUERIES[1], document)
    assert found.clues and all(found.text[span.start : span.end] == span.token for span in found.clues)
    if clues == "top_k":
        pieces = [model.tokenizer.decode([i]).strip() for i in clue_ids(model, QUERIES[1], document)]
        assert [token.token for token in found.tokens] == pieces
    else:
        assert len(found.attention.spans) == found.attention.weights.shape[-1]
        places = [place for place in found.attention.spans if place[0] < place[1]]
        assert places[0][0] == 0 and places[-1][1] == len(found.text)


@pytest.mark.parametrize("clues", ["top_k", "attention"])
def test_training_overfits(clues, tmp_path):
    transformers.logging.set_verbosity_error()
    examples = [
        {"query": query, "positives": [positive], "negatives": [negative]}
        for query, positive, negative in [
            (QUERIES[0], DOCUMENTS[0], DOCUMENTS[2]),
            (QUERIES[1], DOCUMENTS[1], DOCUMENTS[0]),
        ]
    ]
    model = official_model(clues, moved=False, dropout=0.1, queries_per_group=2)
    args = transformers.TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=30,
        use_cpu=True,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    before = {name: p.detach().clone() for name, p in model.clues.named_parameters()}
    trainer = qpeft.QPeftTrainer(model=model, args=args, train_dataset=examples)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert min(losses[-5:]) < 0.8 * losses[0]
    for name, parameter in model.clues.named_parameters():
        assert not torch.equal(before[name], parameter), name
