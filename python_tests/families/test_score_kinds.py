"""Every kind of score: what the LM's own forward says, the same on both paths, trained, saved and loaded."""

from __future__ import annotations

import pytest
import torch
from families.tiny import DOCUMENTS, PAIRS, tiny_lm, tiny_tokenizer

import qpeft_ext as qpeft
from qpeft_ext.prefixes.manifest import prompt_settings

pytestmark = pytest.mark.slow

FAMILIES = ("llama", "qwen3", "gemma3", "gpt2", "t5")
WORDS = {"yes_words": ("y", "t"), "no_words": ("n",)}
KINDS = {
    "likelihood": {},
    "yes_no": WORDS,
    "graded": {"max_grade": 3},
    "both": WORDS,
}
# ids of the byte-level tokenizer: each word in both casings
YES, NO, GRADES = "yYtT", "nN", "0123"


def id_of(letter: str) -> int:
    return tiny_tokenizer().convert_tokens_to_ids(letter)


def config_of(kind: str, **options) -> qpeft.QPeftConfig:
    return qpeft.QPeftConfig(**({"clues": "none", "score": kind} | KINDS[kind] | options))


def model_of(lm, kind: str, **options) -> qpeft.QPeftModel:
    """A model whose modules have left their start, as after training."""
    model = qpeft.get_qpeft_model(lm, config_of(kind, **options), tiny_tokenizer())
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def own_scores(model, kind: str) -> torch.Tensor:
    """Float64 scores of one unpadded forward of the LM per pair, from ids."""
    found, asked = [], tiny_tokenizer()("\nRelevance from 0 to 3:" if kind == "graded" else "\nRelevant:",
                                        add_special_tokens=False)["input_ids"]  # fmt: skip
    for query, document in PAIRS:
        prefix, target = model.prompt.documents([document])[0].ids, list(model.prompt.queries([query])[0])
        before = [*prefix, *model.prompt.suffix.bare_question]
        behind = [] if kind == "likelihood" else asked
        if model.engine.is_encoder_decoder:
            start = [model.engine.start, *model.prompt.suffix.given]
            given = {
                "input_ids": torch.tensor([before]),
                "decoder_input_ids": torch.tensor([[*start, *target, *behind]]),
            }
            before = start
        else:
            given = {"input_ids": torch.tensor([[*before, *target, *behind]])}
        p = model.lm(**given, use_cache=False).logits[0].double().softmax(-1)
        of_query = sum(p[len(before) - 1 + i, token].log() for i, token in enumerate(target))
        last = p[-1]
        odds = last[[id_of(x) for x in YES]].sum().log() - last[[id_of(x) for x in NO]].sum().log()
        grades = last[[id_of(x) for x in GRADES]]
        found.append(
            {
                "likelihood": of_query,
                "yes_no": odds,
                "graded": (grades / grades.sum()) @ torch.arange(4.0, dtype=torch.float64),
                "both": of_query / len(target) + (model.mixed_score.weight.double() if model.mixed_score else 0) * odds,
            }[kind]
        )
    return torch.stack(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_is_what_the_lm_says(family, kind):
    model = model_of(tiny_lm(family), kind)
    expected = own_scores(model, kind)
    assert expected.std() > 0.01
    tolerance = 2e-4 if kind == "likelihood" else 1e-5  # a sum over 20 tokens
    for options in ({}, {"path": "plain"}, {"deterministic": True}, {"max_tokens_per_batch": 64}):
        scores = model.ranked_by(model.score(PAIRS, **options)).double()
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=tolerance)
    reranked = qpeft.Reranker(model, cache=qpeft.DocumentCache()).predict(PAIRS)
    torch.testing.assert_close(torch.from_numpy(reranked).double(), expected, rtol=1e-5, atol=tolerance)


def scores_and_gradients(model, path: str, **options):
    model.zero_grad()
    scores = model.train()(model.encode(PAIRS), path=path, **options).compared
    (scores * torch.linspace(-1, 1, len(scores))).sum().backward()  # every pair pulls in its own way
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return scores.detach(), gradients


def assert_same(first, second):
    torch.testing.assert_close(first[0], second[0], rtol=0, atol=1e-5)
    assert first[1].keys() == second[1].keys() and first[1]
    largest = max(float(g.norm()) for g in second[1].values())
    for name, gradient in second[1].items():
        assert float((first[1][name] - gradient).norm()) <= 1e-5 * largest, name


TRAINED = {
    "clues and generated LoRA": {"clues": "top_k", "k": 3, "rank": 8, "generated_lora_rank": 2,
                                 "target_modules": "all-linear"},
    "attention": {"clues": "attention", "num_heads": 4, "rank": 8},
    "soft prompt": {"num_virtual_tokens": 3},
    "generated LoRA": {"generated_lora_rank": 2, "target_modules": "all-linear"},
}  # fmt: skip


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "likelihood"])
@pytest.mark.parametrize("family", FAMILIES)
def test_document_first_equals_plain(family, kind, trained):
    model = model_of(tiny_lm(family), kind, **TRAINED[trained])
    plain = scores_and_gradients(model, "plain")
    assert plain[0].std() > 1e-3  # the documents matter
    assert ("mixed_score.weight" in plain[1]) is (kind == "both")
    assert_same(scores_and_gradients(model, "document_first"), plain)
    model.qpeft_config.suffix_micro_batch = 2  # computed again in the backward pass
    assert_same(scores_and_gradients(model, "document_first", max_tokens_per_batch=64), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_of_peft(kind):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    model = model_of(peft.get_peft_model(tiny_lm("llama"), lora), kind)
    torch.testing.assert_close(model.ranked_by(model.score(PAIRS)).double(), own_scores(model, kind),
                               rtol=1e-5, atol=2e-4 if kind == "likelihood" else 1e-5)  # fmt: skip
    assert_same(scores_and_gradients(model, "document_first"), scores_and_gradients(model, "plain"))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "likelihood"])
@pytest.mark.parametrize(
    "family", ["mamba", "gemma2", "cohere", "opt"]
)  # no shared cache, a cap, a scale, a projection
def test_other_heads(family, kind):
    model = model_of(tiny_lm(family), kind)
    torch.testing.assert_close(
        model.ranked_by(model.score(PAIRS)).double(), own_scores(model, kind), rtol=1e-5, atol=2e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_that_is_left_to_the_lm(kind):
    """Packed heads and those of other formulas: the LM's own logits are read."""
    model, left = (model_of(tiny_lm("llama"), kind) for _ in range(2))
    left.engine.head.fused = False
    for path in ("document_first", "plain"):
        expected, got = (of.ranked_by(of.score(PAIRS, path=path)) for of in (model, left))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_clues_first(kind):
    model = model_of(tiny_lm("llama"), kind, clues="top_k", k=3, rank=8, layout="clues_first")
    alone = torch.cat([model.ranked_by(model.score([pair])) for pair in PAIRS])
    torch.testing.assert_close(model.ranked_by(model.score(PAIRS)), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded(family, kind, tmp_path):
    lm = tiny_lm(family)
    model = model_of(lm, kind, **TRAINED["clues and generated LoRA"])
    model.save_pretrained(tmp_path)
    loaded = qpeft.QPeftModel.from_pretrained(tmp_path, lm, tiny_tokenizer())
    assert loaded.qpeft_config == model.qpeft_config
    assert torch.equal(loaded.score(PAIRS).compared, model.score(PAIRS).compared)


def test_prefixes_do_not_depend_on_the_score():
    """One index serves all."""
    lm, cache = tiny_lm("llama"), qpeft.DocumentCache()
    models = [model_of(lm, kind) for kind in KINDS]
    assert len({str(prompt_settings(model.prompt)) for model in models}) == 1
    models[0].score(PAIRS, cache=cache)
    read = cache.misses
    for model in models[1:]:
        expected = model.score(PAIRS).compared
        torch.testing.assert_close(model.score(PAIRS, cache=cache).compared, expected, rtol=0, atol=1e-5)
    assert cache.misses == read == len(DOCUMENTS)


def test_an_instruction_stands_before_the_question():
    model = model_of(tiny_lm("llama"), "both")
    asked = model.encode(PAIRS, instructions=["Find the sea."] * len(PAIRS))
    pieces = model.prompt.instructed("Find the sea.")
    assert pieces.asked == model.prompt.suffix.asked and pieces.scores_query
    by_path = [model(asked, path=path).compared.detach() for path in ("document_first", "plain")]
    torch.testing.assert_close(*by_path, rtol=0, atol=1e-5)
    assert float((by_path[0] - model.score(PAIRS).compared).abs().max()) > 1e-3


def test_one_row_a_pair_is_read():
    """The last layer's feed-forward computes one row of a pair for an answer, instead of one for each query token."""
    rows = {}
    for kind in KINDS:
        model = model_of(tiny_lm("llama"), kind)
        batch = model.encode(PAIRS)
        rows[kind] = model.engine.assemble(batch, model.prompt.suffix, [0] * len(batch), with_prefix=False).read
    tokens = sum(len(batch.queries[q]) for q, _ in batch.pairs)
    assert {kind: len(read.slots) for kind, read in rows.items()} == {
        "likelihood": tokens, "yes_no": len(PAIRS), "graded": len(PAIRS), "both": tokens + len(PAIRS),
    }  # fmt: skip
    assert rows["both"].slots.tolist() == sorted(rows["both"].slots.tolist())


def test_the_score_of_a_likelihood_has_its_parts():
    model = model_of(tiny_lm("llama"), "both")
    scores, alone = model.score(PAIRS), model_of(tiny_lm("llama"), "likelihood").score(PAIRS)
    torch.testing.assert_close(scores.query_log_likelihood, alone.query_log_likelihood, rtol=0, atol=1e-4)
    assert torch.equal(scores.num_tokens, alone.num_tokens) and alone.answer is None
    odds = model_of(tiny_lm("llama"), "yes_no").score(PAIRS)
    torch.testing.assert_close(scores.answer, odds.answer, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="there is no likelihood of the query"):
        _ = odds.query_log_likelihood
    assert not len(model.score([]).compared)


def test_the_words_of_the_question_can_be_chosen():
    lm = tiny_lm("llama")
    usual = model_of(lm, "yes_no")
    same = model_of(lm, "yes_no", ask="Relevant:")
    other = model_of(lm, "yes_no", ask="Does it answer?")
    assert torch.equal(usual.score(PAIRS).compared, same.score(PAIRS).compared)
    assert not torch.allclose(usual.score(PAIRS).compared, other.score(PAIRS).compared, atol=1e-3)
    exact = model_of(lm, "yes_no", exact_words=True)
    assert exact.answer.yes == tuple(sorted(map(id_of, "yt"))) and exact.answer.no == (id_of("n"),)
    assert usual.answer.yes == tuple(sorted(map(id_of, YES)))
