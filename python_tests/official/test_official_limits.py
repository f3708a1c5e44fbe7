"""`compat="official"`: what of the official code is refused, and how the rest of the package uses such a model."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from families.tiny import tiny_lm, tiny_tokenizer
from families.tiny_llama import tiny_llama, tiny_llama_tokenizer
from official.models import (
    DOCUMENTS,
    PAIRS,
    QUERIES,
    clue_ids,
    expected_ids,
    official_model,
    restated,
    text_of,
)
from official.restatement import Refused

import qpeft_ext as qpeft
from qpeft_ext.engine.rows import assemble_rows
from qpeft_ext.official.likelihood import count_uncertain_tokens

pytestmark = pytest.mark.slow


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


@pytest.mark.slow
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
