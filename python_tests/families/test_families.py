"""Every family: the document-first path equals the plain path, and a score depends on its pair alone."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from tiny import DOCUMENTS, FAMILIES, PAIRS, PLAIN_ONLY, QUERIES, tiny_lm, tiny_tokenizer

import qpeft_ext as qpeft
from qpeft_ext.adapters.files import save_adapter
from qpeft_ext.engine import causal as engine

pytestmark = pytest.mark.slow

CLUES = ["attention", "top_k", "none"]


def trained_model(lm, clues: str, seed: int = 1, **options) -> qpeft.QPeftModel:
    """A model whose clue module has left the identity, as after training."""
    config = qpeft.QPeftConfig(clues=clues, num_heads=4, k=5, rank=8, **options)
    model = qpeft.get_qpeft_model(lm, config, tiny_tokenizer())
    torch.manual_seed(seed)
    for parameter in model.clues.parameters() if model.clues else ():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request):
    return tiny_lm(request.param)


@pytest.fixture(scope="module")
def model_with(lm):
    """Return the model of a family with a kind of clues. Tests share it, since making one tries the LM out."""
    return functools.cache(functools.partial(trained_model, lm))


@pytest.fixture(scope="module")
def scores_with(model_with):
    """Return the scores of all pairs, in one call, with a kind of clues."""
    return functools.cache(lambda clues: model_with(clues).score(PAIRS).mean_query_log_likelihood)


def scores_and_gradients(model, path: str, **options):
    model.zero_grad()
    scores = model.train()(model.encode(PAIRS), path=path, **options).mean_query_log_likelihood
    weights = torch.linspace(-1, 1, len(scores))  # every pair pulls in its own way
    (scores * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return scores.detach(), gradients


def assert_same(first, second):
    torch.testing.assert_close(first[0], second[0], rtol=0, atol=1e-5)
    assert first[1].keys() == second[1].keys() and first[1]
    largest = max(float(g.norm()) for g in second[1].values())
    for name, gradient in second[1].items():
        # relative to the gradient as a whole: b_k's is zero but for rounding
        assert float((first[1][name] - gradient).norm()) <= 1e-5 * largest, name


def assert_as_exact(found, plain, model):
    """Check scores and gradients like `assert_same`, with more room for the gradients where rounding needs it.

    In float32, rounding alone may move gradients through whole prompts by more than 1e-5. Then they are compared with
    the plain path in float64, and may be off by twice what the plain path is off in float32. The model may be in
    float64 afterwards.
    """
    try:
        return assert_same(found, plain)
    except AssertionError:
        torch.testing.assert_close(found[0], plain[0], rtol=0, atol=1e-5)
    exact = scores_and_gradients(model.double(), "plain")[1]
    assert found[1].keys() == exact.keys()
    largest = max(float(g.norm()) for g in exact.values())
    rounding = max(float((plain[1][name] - gradient).norm()) for name, gradient in exact.items())
    for name, gradient in exact.items():
        assert float((found[1][name] - gradient).norm()) <= 2 * rounding <= 1e-4 * largest, name


@pytest.mark.parametrize("clues", ["attention", "top_k"])
def test_document_first_equals_plain(model_with, clues, monkeypatch):
    model = model_with(clues)
    assert not model.engine.why_not_cached and model.engine.head.fused
    plain = scores_and_gradients(model, "plain")
    assert_same(scores_and_gradients(model, "document_first"), plain)
    # prefixes in groups of their own and suffixes in several passes: the same numbers
    assert_same(scores_and_gradients(model, "document_first", max_tokens_per_batch=64), plain)
    monkeypatch.setattr(model.qpeft_config, "suffix_micro_batch", 2)
    assert_same(scores_and_gradients(model, "document_first"), plain)


def test_upr_document_first_equals_plain(model_with, scores_with):
    plain = model_with("none").score(PAIRS, path="plain").mean_query_log_likelihood
    torch.testing.assert_close(scores_with("none"), plain, rtol=0, atol=1e-5)
    assert plain.std() > 0.05  # otherwise the test could not see a wrong document


def test_cached_prefixes_of_any_length_share_a_pass(model_with):
    model, cache = model_with("none"), qpeft.DocumentCache(1 << 24)
    plain = model.score(PAIRS, path="plain").mean_query_log_likelihood
    model.score(PAIRS, cache=cache)
    scores = model.score(PAIRS, cache=cache, prefilled=True).mean_query_log_likelihood
    torch.testing.assert_close(scores, plain, rtol=0, atol=1e-5)


def test_plain_equals_the_language_model_itself(lm, model_with):
    """The oracle's oracle: one unpadded forward of the LM a pair, with its own logits."""
    model = model_with("none")
    scores = model.score(PAIRS, path="plain").query_log_likelihood
    for (query, document), score in zip(PAIRS, scores, strict=True):
        prefix, target = model.prompt.documents([document])[0].ids, model.prompt.queries([query])[0]
        ids = torch.tensor([[*prefix, *model.prompt.suffix.bare_question, *target]])
        with torch.no_grad():
            log_p = lm(input_ids=ids).logits[0].log_softmax(-1)
        expected = sum(log_p[-len(target) - 1 + i, token] for i, token in enumerate(target))
        assert float(score - expected) == pytest.approx(0, abs=1e-4)


def test_identity_clues_are_the_tokens_themselves(lm):
    """Frozen table, MLP at its identity start: the same score as with the clue tokens written as ids."""
    model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="top_k", k=3, rank=8), tiny_tokenizer())
    query, document = QUERIES[0], DOCUMENTS[3]
    batch = model.encode([(query, document)])
    ids = model.compute_clues(batch, explain=True).explanation["clue_ids"][0].tolist()
    suffix, target = model.prompt.suffix, batch.queries[0]
    whole = [*batch.documents[0].ids, *suffix.hints, *ids, *suffix.question, *target]
    with torch.no_grad():
        log_p = lm(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    expected = sum(log_p[-len(target) - 1 + i, token] for i, token in enumerate(target))
    assert float(model.score([(query, document)]).query_log_likelihood - expected) / len(target) == pytest.approx(
        0, abs=1e-5
    )


@pytest.mark.parametrize("clues", CLUES)
def test_a_pair_alone_equals_the_pair_in_any_batch(model_with, scores_with, clues):
    model, together = model_with(clues), scores_with(clues)
    alone = torch.cat([model.score([pair]).mean_query_log_likelihood for pair in PAIRS])
    backwards = model.score(PAIRS[::-1]).mean_query_log_likelihood.flip(0)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(together, backwards, rtol=0, atol=1e-5)


@pytest.mark.parametrize("clues", CLUES)
def test_cold_cache_equals_warm_cache(model_with, scores_with, clues):
    model, cache = model_with(clues), qpeft.DocumentCache(1 << 24)
    cold = model.score(PAIRS, cache=cache).mean_query_log_likelihood
    assert cache.hits == 0 and len(cache) == len(DOCUMENTS)
    warm = model.score(PAIRS, cache=cache).mean_query_log_likelihood
    assert cache.hits == len(DOCUMENTS)
    partly = qpeft.DocumentCache(1 << 24)
    model.score(PAIRS[:1], cache=partly)
    for other in (
        warm,
        model.score(PAIRS, cache=partly).mean_query_log_likelihood,
        scores_with(clues),
    ):
        torch.testing.assert_close(cold, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("clues", CLUES)
def test_deterministic_scores_are_bit_equal(model_with, clues):
    model, cache = model_with(clues), qpeft.DocumentCache(1 << 24)
    together = model.score(PAIRS, deterministic=True).query_log_likelihood
    alone = torch.cat([model.score([pair], deterministic=True).query_log_likelihood for pair in PAIRS])
    cold = model.score(PAIRS[::-1], deterministic=True, cache=cache).query_log_likelihood.flip(0)
    warm = model.score(PAIRS, deterministic=True, cache=cache).query_log_likelihood
    assert torch.equal(together, alone) and torch.equal(together, cold) and torch.equal(together, warm)
    torch.testing.assert_close(together, model.score(PAIRS).query_log_likelihood, rtol=1e-5, atol=1e-4)


def test_the_frozen_lm_stays_in_eval_mode(model_with):
    model = model_with("attention").train()
    assert model.training and model.clues.training
    assert not any(module.training for module in model.lm.modules())
    assert not any(p.requires_grad for p in model.lm.parameters())


@pytest.mark.parametrize("trained", [{"clues": "top_k", "k": 5}, {"clues": "none", "num_virtual_tokens": 3}],
                         ids=["frozen prefixes", "trained prefixes"])  # fmt: skip
def test_passes_that_are_filled_up_to_few_shapes(lm, trained, monkeypatch):
    """As in bfloat16 on a CPU, where each new shape takes time: prefixes are no wider for it afterwards."""
    model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(**trained), tiny_tokenizer())
    expected, widths = scores_and_gradients(model, "document_first"), []
    run = model.engine._run_prefix
    monkeypatch.setattr(
        model.engine, "_run_prefix", lambda embeds, *args: widths.append(embeds.shape[:2]) or run(embeds, *args)
    )
    monkeypatch.setattr(engine, "shape_step", lambda device, dtype: 7)
    assert_same(scores_and_gradients(model, "document_first"), expected)
    assert max(B for B, _ in widths) > 1 and all(width % 7 == 0 for B, width in widths if B > 1)
    ids = [document.ids for document in model.encode(PAIRS).documents]
    prefix = model.engine.prefill(ids)
    longest = max(map(len, ids))
    assert longest % 7 and prefix.padded_length == longest
    assert all(kv.keys.shape[-2] == min(longest, (kv.window or 1e9) - 1) for kv in prefix.layers if kv)
    model.engine.prefill(ids[:1])
    assert widths[-1] == (1, len(ids[0]))  # one that is alone is as long as it is


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_lora_gets_its_gradient_through_shared_prefixes(family):
    lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = trained_model(peft.get_peft_model(tiny_lm(family), lora), "attention")
    plain = scores_and_gradients(model, "plain")
    assert any("lora_" in name for name in plain[1])
    assert_as_exact(scores_and_gradients(model, "document_first", cache=qpeft.DocumentCache()), plain, model)


def test_saved_adapters_score_the_same_in_a_new_process(tmp_path):
    """All families, every second one also over a peft LoRA: save, load in one new process, bit-equal scores."""
    expected = {}
    for number, family in enumerate(FAMILIES):
        for wrapped in (False, True)[: 2 - number % 2]:
            lm, folder = tiny_lm(family), tmp_path / f"{family}-{wrapped}"
            lm.save_pretrained(folder / "lm")
            tiny_tokenizer().save_pretrained(folder / "lm")
            lm = qpeft.load_lm(folder / "lm")
            if wrapped:
                lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
                lm = peft.get_peft_model(lm, lora)
            model = trained_model(lm, "attention" if wrapped else "top_k")
            save_adapter(model, folder / "adapter")
            assert (folder / "adapter" / "lm_adapter").exists() == wrapped
            expected[folder.name] = model.score(PAIRS).query_log_likelihood.tolist()
    script = (
        "import sys, json, pathlib; sys.path.insert(0, sys.argv[2])\n"
        "import qpeft_ext as qpeft; from tiny import PAIRS\n"
        "load = qpeft.QPeftModel.from_pretrained\n"
        "folders = sorted(pathlib.Path(sys.argv[1]).iterdir())\n"
        "print(json.dumps({f.name: load(f / 'adapter').score(PAIRS).query_log_likelihood.tolist() for f in folders}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(tmp_path), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_lm_keeps_its_dtype_and_the_clue_module_its_float32(dtype):
    model = trained_model(tiny_lm("llama", dtype=dtype), "attention")
    assert model.engine.table.dtype == dtype
    assert all(p.dtype == torch.float32 for p in model.clues.parameters())
    exact = trained_model(tiny_lm("llama"), "attention").score(PAIRS).mean_query_log_likelihood
    scores, gradients = scores_and_gradients(model, "document_first")
    torch.testing.assert_close(scores, exact, rtol=0.1, atol=0.1)
    assert all(torch.isfinite(g).all() and g.dtype == torch.float32 for g in gradients.values())


@pytest.mark.parametrize("family", PLAIN_ONLY)
def test_a_model_with_recurrent_state_takes_the_plain_path(family):
    model, cache = trained_model(tiny_lm(family), "top_k"), qpeft.DocumentCache()
    assert "cannot be shared" in model.engine.why_not_cached
    together = model.score(PAIRS, cache=cache).mean_query_log_likelihood
    alone = torch.cat([model.score([pair]).mean_query_log_likelihood for pair in PAIRS])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert len(cache) == 0


def test_a_head_that_the_formula_does_not_describe_is_left_to_the_model():
    """An LM with a logit scale under a name of its own: its own logits are used, and it says so."""
    lm = tiny_lm("llama")
    expected = trained_model(lm, "none").score(PAIRS).mean_query_log_likelihood
    forward = lm.forward
    lm.forward = lambda *args, **kwargs: _halved(forward(*args, **kwargs))
    model = trained_model(lm, "none")
    assert not model.engine.head.fused and "does not give this model's logits" in model.engine.head.reason
    scores = {path: model.score(PAIRS, path=path).mean_query_log_likelihood for path in ("plain", "document_first")}
    torch.testing.assert_close(scores["plain"], scores["document_first"], rtol=0, atol=1e-5)
    assert not torch.allclose(scores["plain"], expected, atol=1e-2)


def _halved(output):
    output.logits = output.logits / 2
    return output
