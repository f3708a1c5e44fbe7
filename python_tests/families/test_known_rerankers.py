"""Scores of known rerankers: against each model card's formula on tiny LMs of its family, whole prompts or shared."""

from __future__ import annotations

import pytest
import torch
from families.tiny import _COMMON, draw_weights, tiny_lm, tiny_tokenizer
from prompts.reranker_cards import CARDS, PAIRS, text_of
from prompts.reranker_tokenizers import gemma_tokenizer, qwen_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import qpeft_ext as qpeft
from qpeft_ext.lm.classifier import ClassifierLM
from qpeft_ext.prefixes.cache import DocumentCache
from qpeft_ext.prefixes.index_writer import IndexWriter
from qpeft_ext.ranking.without_adapter import config_without_adapter

pairs = [(query, document) for query, document in PAIRS if document]


def tiny_gemma(tokenizer):
    """The first Gemma, of which bge-reranker-v2-gemma is."""
    config = AutoConfig.for_model("gemma", **_COMMON | {"vocab_size": len(tokenizer)})
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config)
    draw_weights(lm)
    return lm.eval()


def logits_of(lm, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return lm(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()


def score_of_qwen3(tokenizer, logits: torch.Tensor) -> float:
    """The card's probability of "yes", of the softmax of both; here its log-odds."""
    no, yes = (logits[tokenizer.convert_tokens_to_ids(word)] for word in ("no", "yes"))
    return torch.stack([no, yes]).log_softmax(0)[1].exp().logit()


def score_of_mxbai(tokenizer, logits: torch.Tensor) -> float:
    """The card's logit of "1" less that of "0"."""
    one, zero = (tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in ("1", "0"))
    return logits[one] - logits[zero]


def score_of_flag(tokenizer, logits: torch.Tensor) -> float:
    """The card's logit of "Yes"."""
    return logits[tokenizer("Yes", add_special_tokens=False)["input_ids"][0]]


FAMILIES = {
    "qwen3_reranker": (lambda tokenizer: tiny_lm("qwen3", vocab_size=len(tokenizer)), score_of_qwen3),
    "mxbai_rerank": (lambda tokenizer: tiny_lm("qwen2", vocab_size=len(tokenizer)), score_of_mxbai),
    "flag_reranker": (tiny_gemma, score_of_flag),
}


def reranker_of(template: str, **options):
    tokenizer = CARDS[template][1]()
    lm = FAMILIES[template][0](tokenizer)
    return qpeft.Reranker.from_lm(lm, template, tokenizer=tokenizer, **options)


def scores_of_card(reranker, template: str, given=pairs) -> list[float]:
    tokenizer, lm = reranker.model.tokenizer, reranker.model.lm
    card, score = CARDS[template][0], FAMILIES[template][1]
    rows = [card(tokenizer, query, text_of(document)) for query, document in given]
    return [float(score(tokenizer, logits_of(lm, ids))) for ids in rows]


@pytest.mark.parametrize("template", FAMILIES)
@pytest.mark.parametrize("options", [
    {}, {"path": "plain"}, {"max_tokens_per_batch": 1}, {"deterministic": True},
    {"cache": DocumentCache(1 << 24)},
], ids=["shared", "plain", "alone", "deterministic", "cached"])  # fmt: skip
def test_scores_are_those_of_the_model_card(template, options):
    reranker = reranker_of(template, **options)
    expected = scores_of_card(reranker, template)
    for _ in range(2 if "cache" in options else 1):  # cold and warm
        assert reranker.predict(pairs) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert max(expected) - min(expected) > 0.05, "texts must matter"


@pytest.mark.parametrize("template", FAMILIES)
def test_a_cache_keeps_one_prefix_a_query(template):
    cache = DocumentCache(1 << 24)
    reranker = reranker_of(template, cache=cache)
    reranker.predict(pairs)
    assert (cache.misses, cache.hits > 0) == (len({query for query, _ in pairs}), True)


def test_ranking_and_instruction():
    reranker = reranker_of("qwen3_reranker")
    documents = [document for _, document in pairs[:3]]
    card, tokenizer = CARDS["qwen3_reranker"][0], reranker.model.tokenizer
    instruction = "Find boats."
    rows = [card(tokenizer, "boats", text_of(document), instruction) for document in documents]
    expected = [float(score_of_qwen3(tokenizer, logits_of(reranker.model.lm, ids))) for ids in rows]
    ranked = reranker.rank("boats", documents, instruction=instruction)
    assert {row["corpus_id"]: row["score"] for row in ranked} == pytest.approx(dict(enumerate(expected)), abs=1e-5)
    assert [row["corpus_id"] for row in ranked] == sorted(range(3), key=lambda place: -expected[place])


def test_empty_documents_have_scores():
    for template in FAMILIES:
        assert torch.isfinite(torch.tensor(reranker_of(template).predict([("boats", ""), ("boats", "sea")]))).all()


# -- classifiers -----------------------------------------------------------------------------------------------------


def tiny_classifier(kind: str, tokenizer, labels: int = 1):
    torch.manual_seed(1)
    own = {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8} if kind == "gemma2" else {}
    if kind == "gpt2":
        own = {"n_embd": 32, "n_layer": 2, "n_head": 4}
    config = AutoConfig.for_model(kind, **_COMMON | {"vocab_size": len(tokenizer), "num_labels": labels, **own})
    model = AutoModelForSequenceClassification.from_config(config)
    draw_weights(model)
    return model.eval()


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gpt2", "mistral"])
def test_a_classifier_scores_as_it_does_itself(kind, labels):
    tokenizer = qwen_tokenizer()
    classifier = tiny_classifier(kind, tokenizer, labels)
    expected = []
    for query, document in pairs:
        ids = CARDS["qwen3_reranker"][0](tokenizer, query, text_of(document))
        with torch.no_grad():
            logits = classifier(input_ids=torch.tensor([ids])).logits[0]
        expected.append(float(logits[0] if labels == 1 else logits[1] - logits[0]))
    for path in ("document_first", "plain"):
        reranker = qpeft.Reranker.from_lm(classifier, "qwen3_reranker", tokenizer=tokenizer, path=path)
        assert isinstance(reranker.model.lm, ClassifierLM)
        assert reranker.predict(pairs) == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("make", [gemma_tokenizer, qwen_tokenizer])
def test_a_pair_is_read_as_the_tokenizer_joins_it(make):
    tokenizer = make()
    classifier = tiny_classifier("qwen3", tokenizer)
    reranker = qpeft.Reranker.from_lm(classifier, "pair", tokenizer=tokenizer)
    with torch.no_grad():
        expected = [
            float(classifier(**tokenizer(query, text_of(document), return_tensors="pt")).logits[0, 0])
            for query, document in pairs
        ]
    assert reranker.predict(pairs) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_an_empty_document_of_a_pair_is_a_space():
    """Nothing follows a document there, and the classifier reads its last token."""
    tokenizer = qwen_tokenizer()
    classifier = tiny_classifier("qwen3", tokenizer)
    reranker = qpeft.Reranker.from_lm(classifier, "pair", tokenizer=tokenizer)
    ids = [i for text in ("boats", " ") for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        expected = float(classifier(input_ids=torch.tensor([ids])).logits[0, 0])
    for given in ([("boats", "")], [("boats", ""), ("boats", "sea"), ("why tides?", "the moon")]):
        assert reranker.predict(given)[0] == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_a_classifier_needs_no_words():
    tokenizer = tiny_tokenizer()  # to which yes and no are several tokens
    classifier = tiny_classifier("llama", tokenizer)
    reranker = qpeft.Reranker.from_lm(classifier, "{{ query }}\n{{ document }}\nRelevant:", tokenizer=tokenizer)
    with torch.no_grad():
        ids = tokenizer("boats\nthe sea\nRelevant:", return_tensors="pt")["input_ids"]
        expected = float(classifier(input_ids=ids).logits[0, 0])
    assert reranker.predict([("boats", "the sea")]) == pytest.approx([expected], rel=1e-5, abs=1e-5)


def test_a_classifier_is_loaded_by_its_name(tmp_path):
    tokenizer, folder = qwen_tokenizer(), tmp_path / "Qwen3-Reranker-tiny-seq-cls"
    classifier = tiny_classifier("qwen3", tokenizer)
    classifier.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    found = qpeft.Reranker.from_lm(str(folder))
    assert found.model.qpeft_config.template == "qwen3_reranker"
    expected = qpeft.Reranker.from_lm(classifier, "qwen3_reranker", tokenizer=tokenizer).predict(pairs)
    assert found.predict(pairs) == pytest.approx(expected, abs=1e-6)


def test_a_reranker_is_known_by_its_name(tmp_path):
    tokenizer, folder = qwen_tokenizer(), tmp_path / "Qwen3-Reranker-0.6B"
    tiny_lm("qwen3", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    reranker = qpeft.Reranker.from_lm(folder)
    assert reranker.predict(pairs) == pytest.approx(scores_of_card(reranker, "qwen3_reranker"), rel=1e-5, abs=1e-5)
    other = tmp_path / "some-lm"
    folder.rename(other)
    with pytest.raises(
        ValueError, match="is no known reranker: set template to the one .*; an LM that is no reranker .* --upr`"
    ):
        qpeft.Reranker.from_lm(other)


# -- what cannot be --------------------------------------------------------------------------------------------------


def test_encoders_are_refused():
    config = AutoConfig.for_model("bert", hidden_size=32, num_attention_heads=4, intermediate_size=48,
                                  num_hidden_layers=1, vocab_size=400)  # fmt: skip
    encoder = AutoModelForSequenceClassification.from_config(config).eval()
    with pytest.raises(ValueError, match="BertForSequenceClassification is an encoder-only classifier"):
        qpeft.Reranker.from_lm(encoder, "pair", tokenizer=qwen_tokenizer())


def test_wrong_classifiers():
    tokenizer = qwen_tokenizer()
    with pytest.raises(ValueError, match="has 3 classes; expected one, or two"):
        qpeft.Reranker.from_lm(tiny_classifier("qwen3", tokenizer, 3), "pair", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="is a classifier without words; set template to the one"):
        qpeft.get_qpeft_model(tiny_classifier("qwen3", tokenizer), qpeft.QPeftConfig(clues="none"), tokenizer)
    with pytest.raises(ValueError, match="is a sequence classifier of no known kind: set template"):
        classifier = tiny_classifier("qwen3", tokenizer)
        classifier.config.architectures = ["Qwen3ForSequenceClassification"]
        qpeft.Reranker.from_lm(classifier, tokenizer=tokenizer)


def test_words_of_several_tokens():
    with pytest.raises(ValueError, match="yes_words: 'Yes' must be a single token of the LM's tokenizer, got 'Y'"):
        qpeft.Reranker.from_lm(tiny_lm("qwen3"), "flag_reranker", tokenizer=tiny_tokenizer())


def test_an_index_is_of_no_use():
    with pytest.raises(ValueError, match="no use to this model: its template has the query before the document"):
        IndexWriter(reranker_of("qwen3_reranker").model, {}, "nowhere")


@pytest.mark.parametrize(("template", "context", "limits"), [
    ("qwen3_reranker", 40_960, (8192, 512)),
    ("mxbai_rerank", 32_768, (8192, 512)),
    ("flag_reranker", 8192, (1024, 512)),
    ("qwen3_reranker", 4096, (3072, 512)),
    ("qwen3_reranker", 512, (256, 64)),
    ("pair", 8192, (256, 64)),
])  # fmt: skip
def test_lengths_are_those_of_the_model_cards(template, context, limits):
    """A limit is cut to what the context of the LM has room for. A limit that the user sets replaces it."""
    lm = AutoConfig.for_model("qwen3", max_position_embeddings=context)
    config = config_without_adapter("my-lm", lm, template)
    assert (config.max_document_tokens, config.max_query_tokens) == limits
    asked = config_without_adapter("my-lm", lm, template, max_document_tokens=300, max_query_tokens=None)
    assert (asked.max_document_tokens, asked.max_query_tokens) == (300, limits[1])
