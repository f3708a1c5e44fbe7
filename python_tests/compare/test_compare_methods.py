"""The methods of `qpeft compare` against oracles: peft's own forward pass, plain prompts, autograd through the LM."""

from pathlib import Path

import pytest
import torch
from families.tiny import DOCUMENTS, PAIRS, QUERIES, tiny_lm, tiny_tokenizer
from jobs.processes import Forked
from jobs.tiny_job import save_lm

import qpeft_ext as qpeft
from qpeft_ext.adapters.files import load_weights_into
from qpeft_ext.compare.cost import PeakMemory, Work
from qpeft_ext.compare.methods import PRESETS
from qpeft_ext.compare.plan_file import read_plan
from qpeft_ext.compare.prefix_tuning import PrefixTuningModel
from qpeft_ext.lm.passes import LMPasses

pytestmark = pytest.mark.slow


peft = pytest.importorskip("peft")
PLANS = Path(__file__).parents[2] / "benchmarks"
PLAIN = qpeft.QPeftConfig(clues="none")
# one short and one long document in one pass, each with two queries
RAGGED = [(query, document) for query in QUERIES for document in (DOCUMENTS[0], DOCUMENTS[3], DOCUMENTS[2])]


def prompt_ids(model, query, document, skip=0) -> tuple[list[int], int]:
    """The whole prompt of a pair as ids, and the number of query tokens."""
    batch = model.encode([(query, document)])
    return list(batch.documents[0].ids[skip:] + model.prompt.suffix.bare_question + batch.queries[0]), len(
        batch.queries[0]
    )


def log_likelihood(lm, ids, count):
    """Σ log p of the last ``count`` ids, by one unpadded forward pass."""
    logits = lm(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)).logits[0]
    return logits[:-1].log_softmax(-1).gather(-1, torch.tensor(ids)[1:, None])[-count:, 0].sum()


# -- prefix tuning ---------------------------------------------------------------------------------------------------


def prefix_tuned(family, P=3):
    torch.manual_seed(0)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    return PrefixTuningModel(peft.get_peft_model(tiny_lm(family), config), PLAIN, tiny_tokenizer())


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "granite"])
def test_prefix_tuning_is_that_of_peft(family):
    """Scores and the gradient of the virtual tokens, ragged documents in one pass against one unpadded row each."""
    model = prefix_tuned(family)
    scores = model.train()(model.encode(RAGGED)).query_log_likelihood
    expected = torch.stack([log_likelihood(model.lm, *prompt_ids(model, q, d, skip=3)) for q, d in RAGGED])
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-4)
    (weight,) = (p for p in model.parameters() if p.requires_grad)
    factors = torch.arange(1.0, len(RAGGED) + 1)
    ours, theirs = (torch.autograd.grad((x * factors).sum(), weight)[0] for x in (scores, expected))
    assert float(theirs.abs().max()) > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_prefix_tuning_through_a_cache():
    """What is cached belongs to the virtual tokens as they were; explicit spans still find the document."""
    model, cache = prefix_tuned("llama").eval(), qpeft.DocumentCache(1 << 20)
    batch = model.encode(RAGGED)
    assert batch.documents[1].document_ids == tuple(
        tiny_tokenizer()(f" {DOCUMENTS[3]}", add_special_tokens=False).input_ids
    )
    with torch.no_grad():
        before = model(batch, cache=cache).query_log_likelihood
        torch.testing.assert_close(model(batch, cache=cache, prefilled=True).query_log_likelihood, before)
        assert cache.hits == 3
        next(p for p in model.parameters() if p.requires_grad).add_(0.5)
        after = model(batch, cache=cache).query_log_likelihood
        assert float((after - before).abs().max()) > 0.01
        torch.testing.assert_close(after, model(batch).query_log_likelihood, rtol=1e-5, atol=1e-5)


def test_prefix_tuning_has_the_engines_own_prefix_pass(monkeypatch):
    """So that its times are comparable: what makes other methods' passes faster is set there too."""
    model, entered = prefix_tuned("llama"), []
    prefix = LMPasses.prefix
    monkeypatch.setattr(LMPasses, "prefix", lambda self: entered.append(self) or prefix(self))
    model.score(RAGGED)
    assert entered and all(passes is model.engine.lm_passes for passes in entered)


def test_prefix_tuning_refuses():
    with pytest.raises(ValueError, match="virtual tokens .* would not be read"):  # without its own engine
        qpeft.get_qpeft_model(prefix_tuned("llama").lm, PLAIN, tiny_tokenizer())
    with pytest.raises(ValueError, match="sliding windows is not supported"):
        prefix_tuned("mistral")
    with pytest.raises(ValueError, match="the path document_first only, got 'plain'"):
        prefix_tuned("llama").score(PAIRS, path="plain")


# -- full fine-tuning ------------------------------------------------------------------------------------------------


def fully_trained(family="llama", seed=0):
    config = qpeft.QPeftConfig(clues="none", train_lm=True)
    return qpeft.get_qpeft_model(tiny_lm(family, seed), config, tiny_tokenizer())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_gradient_of_the_whole_lm(family):
    """Through shared prefixes, tied embeddings and the fused head: as autograd through one plain row per pair."""
    model, lm = fully_trained(family), tiny_lm(family)
    assert model.get_nb_trainable_parameters() == (sum(p.numel() for p in lm.parameters()),) * 2
    model.train()(model.encode(RAGGED)).query_log_likelihood.sum().backward()
    torch.stack([log_likelihood(lm, *prompt_ids(model, q, d)) for q, d in RAGGED]).sum().backward()
    for (name, ours), theirs in zip(model.lm.named_parameters(), lm.parameters(), strict=True):
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5 * max(scale, 1.0), msg=name)


def test_a_trained_lm_is_saved_and_read(tmp_path):
    model = fully_trained()
    with torch.no_grad():
        for parameter in model.lm.parameters():
            parameter.mul_(1.1)
    save_lm(tmp_path / "base")
    model.qpeft_config.base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    expected = model.score(PAIRS).query_log_likelihood
    loaded = qpeft.QPeftModel.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded.score(PAIRS).query_log_likelihood, expected)
    assert loaded.get_nb_trainable_parameters()[0] == 0
    assert qpeft.QPeftModel.from_pretrained(tmp_path / "adapter", is_trainable=True).get_nb_trainable_parameters()[0]
    other = fully_trained(seed=1)
    load_weights_into(other, tmp_path / "adapter")
    assert torch.equal(other.score(PAIRS).query_log_likelihood, expected)
    with pytest.raises(ValueError, match="holds a whole LM, trained with train_lm=True; do not pass another"):
        qpeft.QPeftModel.from_pretrained(tmp_path / "adapter", tiny_lm("llama"))


def test_a_trained_lm_is_read_without_the_lm_that_it_was_made_from(tmp_path):
    model = fully_trained()
    model.qpeft_config.base_model_name_or_path = str(tmp_path / "gone")
    model.save_pretrained(tmp_path / "adapter")
    loaded = qpeft.QPeftModel.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded.score(PAIRS).query_log_likelihood, model.score(PAIRS).query_log_likelihood)
    for file in (tmp_path / "adapter" / "lm").glob("*token*"):  # as earlier versions saved it
        file.unlink()
    with pytest.raises(OSError, match="copy the files of that LM's tokenizer into the adapter's folder lm"):
        qpeft.QPeftModel.from_pretrained(tmp_path / "adapter")
    given = qpeft.QPeftModel.from_pretrained(tmp_path / "adapter", tokenizer=tiny_tokenizer())
    assert torch.equal(given.score(PAIRS).query_log_likelihood, model.score(PAIRS).query_log_likelihood)


def test_full_fine_tuning_refuses():
    with pytest.raises(ValueError, match="train_lm=True needs clues='none'"):
        qpeft.QPeftConfig(train_lm=True)
    lora = peft.get_peft_model(tiny_lm("llama"), peft.LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="train_lm=True trains the whole LM; give it without its peft adapter"):
        qpeft.get_qpeft_model(lora, qpeft.QPeftConfig(clues="none", train_lm=True), tiny_tokenizer())


# -- hard clues, costs, plans ----------------------------------------------------------------------------------------


def test_hard_clues_are_the_tokens_themselves():
    config = qpeft.QPeftConfig(**PRESETS["hard_clues"].options, k=3, rank=4)
    model = qpeft.get_qpeft_model(tiny_lm("llama"), config, tiny_tokenizer())
    pair = (QUERIES[0], DOCUMENTS[3])
    batch = model.encode([pair])
    clues = model.compute_clues(batch, explain=True).explanation["clue_ids"][0].tolist()
    pieces, query = model.prompt.suffix, batch.queries[0]
    ids = [*batch.documents[0].ids, *pieces.hints, *clues, *pieces.question, *query]
    torch.testing.assert_close(
        model.score([pair]).query_log_likelihood[0], log_likelihood(model.lm, ids, len(query)), rtol=1e-5, atol=1e-5
    )


def test_work_by_hand():
    """Two documents, three pairs, without and with what a cache holds; FLOPs from the sizes of the tiny Llama."""
    model, cache = qpeft.get_qpeft_model(tiny_lm("llama"), PLAIN, tiny_tokenizer()), qpeft.DocumentCache(1 << 20)
    pairs = [(QUERIES[0], DOCUMENTS[0]), (QUERIES[1], DOCUMENTS[0]), (QUERIES[0], DOCUMENTS[3])]
    batch = model.encode(pairs)
    prefix = [len(batch.documents[d].ids) for _, d in batch.pairs]
    suffix = [len(model.prompt.suffix.bare_question) + len(batch.queries[q]) - 1 for q, _ in batch.pairs]
    of_suffixes = sum(s * p + s * (s + 1) // 2 for p, s in zip(prefix, suffix, strict=True))
    of_prefixes = sum(len(d.ids) * (len(d.ids) + 1) // 2 for d in batch.documents)
    with torch.no_grad():
        for path, tokens, attended in (
            ("document_first", prefix[0] + prefix[2] + sum(suffix), of_prefixes + of_suffixes),
            ("document_first", sum(suffix), of_suffixes),  # the prefixes are in the cache now
            (
                "plain",
                sum(prefix) + sum(suffix),
                sum((p + s) * (p + s + 1) // 2 for p, s in zip(prefix, suffix, strict=True)),
            ),
        ):
            with Work(model.engine) as work:
                model(batch, path=path, cache=cache)
            assert (work.tokens, work.attended) == (tokens, attended)
    D, inner, V = 32, 48, 260
    N = 2 * (2 * D * D + 2 * D * 16 + 3 * D * inner + 2 * D) + D  # q, o; k, v of half the heads; MLP; three norms
    assert work.flops(10) == 2 * N * work.tokens + 4 * 2 * 32 * work.attended + 2 * D * V * 10


def test_peak_memory():
    """Of a process of its own: what was freed before does not hide what is taken, and the peak is not the end."""
    if PeakMemory(torch.device("cpu")).__enter__()._before is None:
        pytest.skip("the system does not let a process set back its high-water mark")

    def work() -> None:
        freed = torch.ones(30_000_000)
        del freed
        with PeakMemory(torch.device("cpu")) as peak:
            for _ in range(3):
                held = torch.ones(20_000_000)
            del held
        assert 70e6 < peak.bytes < 250e6, peak.bytes
        with PeakMemory(torch.device("cpu")) as peak:
            pass
        assert peak.bytes < 10e6, peak.bytes

    code, _, err = Forked(work).end()
    assert code == 0, err


@pytest.mark.parametrize("path", sorted(PLANS.glob("*/*.yaml")), ids=lambda path: path.name)
def test_the_committed_plans(path):
    plan = read_plan(path)
    for method in plan.methods.values():
        plan.config(method, plan.seeds[0])
