"""T5, FLAN-T5, BART, Pegasus: scores and gradients equal those of one unpadded forward of the LM a pair; UPR."""

from __future__ import annotations

import peft
import pytest
import torch
from test_families import assert_same, scores_and_gradients
from test_families import trained_model as model_with_byte_tokenizer
from tiny import DOCUMENTS, ENCODER_DECODERS, PAIRS, QUERIES, tiny_lm, tiny_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerFast

import qpeft_ext as qpeft
from qpeft_ext.prompts.pairs import PairBatch
from qpeft_ext.prompts.prompt import document_text

pytestmark = pytest.mark.slow

AROUND = {"t5": "$A </s>", "flan_t5": "$A </s>", "bart": "<s> $A </s>", "pegasus": "$A </s>"}


@pytest.fixture(scope="module", params=ENCODER_DECODERS)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def lm(family):
    return tiny_lm(family)


def trained_model(lm, clues: str, around: str = "$A </s>", **options) -> qpeft.QPeftModel:
    model = model_with_byte_tokenizer(lm, clues, **options)
    return with_tokenizer(model, tiny_tokenizer(around))


def with_tokenizer(model: qpeft.QPeftModel, tokenizer) -> qpeft.QPeftModel:
    model.prompt = type(model.prompt)(tokenizer, model.qpeft_config, encoder_decoder=True)
    model.tokenizer = tokenizer
    return model


def one_pair(model: qpeft.QPeftModel, batch: PairBatch, i: int) -> torch.Tensor:
    """Σ log p of pair i, with grad: one row, no padding, the LM's own embedding, masks, head and logits."""
    part, pieces = batch.select([i]), model.prompt.suffix
    query, document = batch.pairs[i]
    clues = model.compute_clues(part)
    vectors = clues.embeds[clues.mask] if clues else []
    after = [*pieces.hints, *[0] * len(vectors), *pieces.question] if len(vectors) else pieces.bare_question
    prefix = batch.documents[document].ids
    ids = torch.tensor([[*prefix, *after]])
    start = [model.lm.config.decoder_start_token_id]
    targets = [*pieces.scored_before, *batch.queries[query], *pieces.scored_after]
    given = torch.tensor([[*start, *pieces.given, *targets[:-1]]])
    if len(vectors):
        embeds = model.lm.get_input_embeddings()(ids)
        if model.lm.config.model_type == "pegasus":
            embeds = embeds * model.lm.config.d_model**0.5
        place = len(prefix) + len(pieces.hints)
        embeds = torch.cat([embeds[:, :place], vectors[None], embeds[:, place + len(vectors) :]], dim=1)
        logits = model.lm(inputs_embeds=embeds, decoder_input_ids=given).logits
    else:
        logits = model.lm(input_ids=ids, decoder_input_ids=given).logits
    log_p = logits[0, -len(targets) :].log_softmax(-1)
    return log_p[torch.arange(len(targets)), torch.tensor(targets)].sum()


def oracle(model: qpeft.QPeftModel):
    """`scores_and_gradients`, pair by pair."""
    model.zero_grad()
    batch = model.train().encode(PAIRS)
    besides = len(model.prompt.suffix.scored(()))
    lengths = torch.tensor([len(batch.queries[q]) + besides for q, _ in batch.pairs])
    scores = torch.stack([one_pair(model, batch, i) for i in range(len(batch))]) / lengths
    if scores.requires_grad:
        (scores * torch.linspace(-1, 1, len(scores))).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return scores.detach(), gradients


@pytest.mark.parametrize("clues", ["attention", "top_k"])
def test_scores_and_gradients_equal_those_of_one_pair_at_a_time(lm, family, clues):
    model = trained_model(lm, clues, AROUND[family])
    assert model.engine.head.fused and "reads in both directions" in model.engine.why_not_cached
    expected = oracle(model)
    assert expected[0].std() > 0.05
    assert_same(scores_and_gradients(model, "document_first"), expected)
    assert_same(scores_and_gradients(model, "plain", max_tokens_per_batch=80), expected)
    model.qpeft_config.suffix_micro_batch = 2
    assert_same(scores_and_gradients(model, "document_first"), expected)


@pytest.mark.parametrize("template", ["qpeft", "upr"])
def test_without_clues_each_document_is_encoded_once(lm, family, template):
    model = trained_model(lm, "none", AROUND[family], template=template)
    expected, _ = oracle(model)
    rows = []
    handle = lm.get_encoder().register_forward_hook(lambda module, inputs, output: rows.append(len(output[0])))
    for options in ({}, {"max_tokens_per_batch": 64}, {"deterministic": True}):
        rows.clear()
        scores = model.score(PAIRS, **options)
        torch.testing.assert_close(scores.mean_query_log_likelihood, expected, rtol=0, atol=1e-5)
        assert sum(rows) == len(DOCUMENTS)
    rows.clear()
    plain = model.score(PAIRS, path="plain").mean_query_log_likelihood
    handle.remove()
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-5)
    assert sum(rows) == len(PAIRS) and expected.std() > 0.05


@pytest.mark.parametrize("family, clues", [("t5", "attention"), ("t5", "none"), ("bart", "none")])
def test_a_trained_lora_gets_its_gradient(family, clues):
    lora = peft.LoraConfig(r=2, target_modules=r".*\.(q|v|k_proj|out_proj)", task_type="SEQ_2_SEQ_LM",
                           init_lora_weights=False)  # fmt: skip
    model = trained_model(peft.get_peft_model(tiny_lm(family), lora), clues)
    expected = oracle(model)
    for part in ("encoder", "decoder"):
        assert any("lora_" in name and f"{part}." in name for name in expected[1])
    assert_same(scores_and_gradients(model, "document_first"), expected)
    assert_same(scores_and_gradients(model, "plain"), expected)


def test_identity_clues_are_the_tokens_themselves(lm):
    model = with_tokenizer(qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="top_k", k=3, rank=8), tiny_tokenizer()),
                           tiny_tokenizer("$A </s>"))  # fmt: skip
    batch = model.encode([(QUERIES[0], DOCUMENTS[3])])
    ids = model.compute_clues(batch, explain=True).explanation["clue_ids"][0].tolist()
    pieces, query = model.prompt.suffix, batch.queries[0]
    whole = torch.tensor([[*batch.documents[0].ids, *pieces.hints, *ids, *pieces.question]])
    with torch.no_grad():
        given = torch.tensor([[lm.config.decoder_start_token_id, *query[:-1]]])
        log_p = lm(input_ids=whole, decoder_input_ids=given).logits[0].log_softmax(-1)
    expected = float(log_p[torch.arange(len(query)), torch.tensor(query)].sum())
    score = float(model.score([(QUERIES[0], DOCUMENTS[3])]).query_log_likelihood)
    assert (score - expected) / len(query) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("clues", ["attention", "none"])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_deterministic_scores_are_bit_equal(family, clues):
    model, cache = trained_model(tiny_lm(family), clues), qpeft.DocumentCache(1 << 24)
    together = model.score(PAIRS, deterministic=True).query_log_likelihood
    alone = torch.cat([model.score([pair], deterministic=True).query_log_likelihood for pair in PAIRS])
    backwards = model.score(PAIRS[::-1], deterministic=True, cache=cache).query_log_likelihood.flip(0)
    assert torch.equal(together, alone) and torch.equal(together, backwards) and len(cache) == 0
    torch.testing.assert_close(together, model.score(PAIRS).query_log_likelihood, rtol=1e-5, atol=1e-4)


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """One token per character with ``▁`` for a space, put before every text; ``</s>`` behind it."""
    letters = ["<pad>", "</s>", "▁", *sorted({c for c in map(chr, range(33, 127))})]
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.normalizer = normalizers.Replace("\n", " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_upr_in_its_own_setting(lm, family, kind):
    """A plain UPR: one text a document, the query as labels; its score is the sum over all labels, ``</s>`` too."""
    tokenizer = tiny_tokenizer(AROUND[family]) if kind == "bytes" else sentencepiece_like()
    model = with_tokenizer(trained_model(lm, "none", template="upr"), tokenizer)
    scores, expected, lengths = model.score(PAIRS), [], []
    for query, document in PAIRS:
        text = f"Passage: {document_text(document)}. Please write a question based on this passage."
        text = text if document_text(document) else text.replace(" .", ".")  # an empty document has no tokens
        labels = torch.tensor([tokenizer(query)["input_ids"]])
        with torch.no_grad():
            logits = lm(input_ids=torch.tensor([tokenizer(text)["input_ids"]]), labels=labels).logits
        expected.append(float(logits.log_softmax(-1).gather(-1, labels[..., None]).sum()))
        lengths.append(labels.numel())
    assert scores.num_tokens.tolist() == lengths
    difference = (scores.query_log_likelihood - torch.tensor(expected)) / torch.tensor(lengths)
    assert difference.abs().max() < 1e-5
    ranked = qpeft.Reranker(model).predict(PAIRS)
    assert torch.tensor(ranked).allclose(torch.tensor(expected), rtol=1e-5, atol=1e-4)


def test_the_decoder_is_given_what_the_tokenizer_begins_with(lm):
    """BART writes ``<s>`` first: the query comes after it, and only the query counts."""
    model = trained_model(lm, "none", "<s> $A </s>")
    pieces, documents = model.prompt.suffix, model.prompt.documents(["sea"])
    assert pieces.given == (0,) and pieces.scored(()) == ()
    text = model.tokenizer.decode(list(documents[0].ids))
    assert text == "<s>Please write a question for the passage. Passage: sea\nQuestion:</s>"
    assert model.score(PAIRS).num_tokens.tolist() == [len(query.encode()) for query, _ in PAIRS]


def test_an_encoder_prompt_with_clues(lm):
    for template, expected in (
        ("qpeft", "Please write a question for the passage. Passage: sea\nhints:*\nQuestion:</s>"),
        ("upr", "Passage: sea hints:*. Please write a question based on this passage.</s>"),
    ):
        prompt = trained_model(lm, "top_k", template=template, max_document_tokens=4).prompt
        ids = [*prompt.documents(["seaside"])[0].ids, *prompt.suffix.hints, *prompt.tokenizer("*")["input_ids"][:1],
               *prompt.suffix.question]  # fmt: skip
        assert prompt.tokenizer.decode(ids) == expected  # the document alone is cut


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_head_that_the_formula_does_not_describe_is_left_to_the_model(family):
    lm = tiny_lm(family)
    expected = trained_model(lm, "top_k").score(PAIRS).mean_query_log_likelihood
    forward = lm.forward

    def halved(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits / 2
        return output

    lm.forward = halved
    model = trained_model(lm, "top_k")
    assert not model.engine.head.fused and "does not give this model's logits" in model.engine.head.reason
    assert_same(scores_and_gradients(model, "document_first"), oracle(model))
    assert not torch.allclose(model.eval().score(PAIRS).mean_query_log_likelihood, expected, atol=1e-2)


def test_the_generated_lora_is_in_the_decoder_alone(lm, family):
    model = trained_model(lm, "none", generated_lora_rank=4, num_hard_negatives=1)
    generated = model.generated_lora
    assert generated.names and all("decoder." in name for name in generated.names)
    torch.manual_seed(1)
    for parameter in generated.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    scores = model.score(PAIRS).mean_query_log_likelihood
    alone = torch.cat([model.score([pair], path="plain").mean_query_log_likelihood for pair in PAIRS])
    torch.testing.assert_close(scores, alone, rtol=0, atol=1e-5)
    weights, batch = dict(lm.named_parameters()), model.encode(PAIRS)
    before = {name: weight.clone() for name, weight in weights.items()}
    for i in (0, 1):  # the weights of one query, in the LM itself
        with torch.no_grad():
            for name, merged in model.merge_for(PAIRS[i][0]).items():
                weights[name].copy_(merged)
            expected = float(one_pair(model, batch, i)) / len(batch.queries[batch.pairs[i][0]])
            for name, weight in before.items():
                weights[name].copy_(weight)
        assert float(scores[i]) == pytest.approx(expected, abs=1e-5)
    if family == "t5":
        with pytest.raises(
            ValueError, match="'encoder.block.0.layer.0.SelfAttention.q' is not a linear layer of this LM's decoder"
        ):
            trained_model(lm, "none", generated_lora_rank=4,
                          target_modules=("encoder.block.0.layer.0.SelfAttention.q",))  # fmt: skip


@pytest.mark.parametrize("family, wrapped", [("t5", True), ("flan_t5", False), ("bart", True)])
def test_an_adapter_is_saved_and_loaded_with_its_lm(family, wrapped, tmp_path):
    tiny_lm(family).save_pretrained(tmp_path / "lm")
    tiny_tokenizer(AROUND[family]).save_pretrained(tmp_path / "lm")
    lm = qpeft.load_lm(tmp_path / "lm")
    if wrapped:
        lora = peft.LoraConfig(r=2, target_modules=r".*\.(q|v|q_proj|v_proj)", task_type="SEQ_2_SEQ_LM",
                               init_lora_weights=False)  # fmt: skip
        lm = peft.get_peft_model(lm, lora)
    model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="top_k", k=5, rank=8, template="upr"))
    torch.manual_seed(0)
    for parameter in model.clues.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    reranker = qpeft.Reranker.from_pretrained(tmp_path / "adapter")
    assert (reranker.predict(PAIRS) == model.score(PAIRS).query_log_likelihood.numpy()).all()
    assert reranker.model.qpeft_config.template == "upr"
    assert reranker.explain(*PAIRS[0]).clues


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_half_precision_and_a_budget_of_memory(family):
    model = trained_model(tiny_lm(family, dtype=torch.bfloat16), "attention")
    exact = trained_model(tiny_lm(family), "attention").score(PAIRS).mean_query_log_likelihood
    scores, gradients = scores_and_gradients(model, "document_first")
    torch.testing.assert_close(scores, exact, rtol=0.1, atol=0.15)
    assert all(torch.isfinite(g).all() and g.dtype == torch.float32 for g in gradients.values())
    reranker = qpeft.Reranker(model, max_memory=256 << 20)
    assert len(reranker.rank(QUERIES[0], DOCUMENTS)) == 4
    assert reranker.cache is not None and len(reranker.cache) == 0


def test_what_is_longer_than_the_context_is_refused():
    model = trained_model(tiny_lm("bart"), "none", max_document_tokens=600, max_query_tokens=600)
    for pair in (("why", "a" * 550), ("w" * 550, "a")):
        with pytest.raises(ValueError, match="does not fit the LM's context of 512"):
            model.score([pair])
    assert trained_model(tiny_lm("t5"), "none", max_document_tokens=600).score([("why", "a" * 550)]).num_tokens == 3


_BERT = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4}  # fmt: skip


@pytest.mark.parametrize("make, reason", [
    (lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **_BERT)), "tokens see those behind them"),
    (lambda: AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **_BERT)), "tokens see those behind them"),
    (lambda: AutoModel.from_config(AutoConfig.for_model("bert", **_BERT)), "without an LM head"),
    (lambda: AutoModel.from_config(tiny_lm("t5").config), "without an LM head"),
    (lambda: AutoModel.from_config(tiny_lm("llama").config), "without an LM head"),
])  # fmt: skip
def test_other_models_are_refused(make, reason):
    with pytest.raises(ValueError, match=r"^expected a causal LM .* or an encoder–decoder LM .*, got a ") as error:
        qpeft.get_qpeft_model(make().eval(), qpeft.QPeftConfig(clues="none"), tiny_tokenizer())
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_a_bert_that_is_a_decoder_is_a_causal_lm():
    config = AutoConfig.for_model("bert", is_decoder=True, **_BERT)
    model = qpeft.get_qpeft_model(AutoModelForCausalLM.from_config(config).eval(), qpeft.QPeftConfig(clues="none"),
                                  tiny_tokenizer())  # fmt: skip
    assert torch.isfinite(model.score(PAIRS).query_log_likelihood).all()


def test_a_folder_of_another_kind_of_model_is_one_clear_line(tmp_path):
    AutoModel.from_config(AutoConfig.for_model("distilbert", dim=32, hidden_dim=48, n_layers=1, n_heads=4,
                                               vocab_size=260)).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(ValueError, match="expected a causal or an encoder–decoder LM, got model_type 'distilbert'"):
        qpeft.load_lm(tmp_path)


def test_a_decoder_start_token_is_needed():
    lm = tiny_lm("t5")
    lm.config.decoder_start_token_id = lm.generation_config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="must have a decoder_start_token_id"):
        trained_model(lm, "none")


def test_compiled_decoders_score_the_same():
    model = trained_model(tiny_lm("t5"), "top_k")
    expected = model.score(PAIRS).mean_query_log_likelihood
    model.engine.compile(backend="eager")
    torch.testing.assert_close(model.score(PAIRS).mean_query_log_likelihood, expected, rtol=0, atol=1e-5)
    assert model.engine.suffix_decoder is not model.engine.decoder
