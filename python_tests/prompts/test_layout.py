"""`layout="clues_first"`: the order of the prompt, scores and gradients against single unpadded forwards."""

from __future__ import annotations

import pytest
import torch
from families.tiny import DOCUMENTS, PAIRS, QUERIES, tiny_lm, tiny_tokenizer

import qpeft_ext as qpeft
from qpeft_ext.prefixes.index_writer import IndexWriter

pytestmark = pytest.mark.slow


def model_with(family: str = "llama", **options) -> qpeft.QPeftModel:
    config = {"clues": "top_k", "k": 4, "num_heads": 4, "rank": 8, "layout": "clues_first"} | options
    model = qpeft.get_qpeft_model(tiny_lm(family), qpeft.QPeftConfig(**config), tiny_tokenizer())
    torch.manual_seed(1)
    for module in model.trained_modules.values():
        for parameter in module.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def by_hand(model, pairs) -> torch.Tensor:
    """Mean log-likelihood of each pair: one forward a pair, its embeddings put one after the other."""
    tokenizer, table = model.tokenizer, model.lm.get_input_embeddings()

    def embed(text: str) -> torch.Tensor:
        return table(torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long))

    means = []
    for query, document in pairs:
        batch = model.encode([(query, document)])
        clues = model.compute_clues(batch)
        clues = clues.embeds[0][clues.mask[0]]
        text = tokenizer.decode(batch.documents[0].document_ids)
        begin = f"<s>{model.qpeft_config.instruction}"
        parts = (
            [embed(f"{begin} hints:"), clues, embed(f"\n Passage:{text}\n")]
            if len(clues)
            else [embed(f"{begin} Passage:{text}\n")]
        )
        target = torch.tensor(batch.queries[0])
        embeds = torch.cat([*parts, embed("Question:"), table(target)])[None]
        log_p = model.lm(inputs_embeds=embeds).logits[0, -len(target) - 1 : -1].log_softmax(-1)
        means.append(log_p[torch.arange(len(target)), target].mean())
    return torch.stack(means)


@pytest.mark.parametrize("clues", ["top_k", "attention"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2", "bloom", "mamba"])
def test_scores_and_gradients_are_those_of_single_forwards(family, clues):
    model = model_with(family, clues=clues).train()
    weights = torch.linspace(-1, 1, len(PAIRS))
    results = []
    for score in (
        lambda: model(model.encode(PAIRS)).mean_query_log_likelihood,
        lambda: model(model.encode(PAIRS), max_tokens_per_batch=64).mean_query_log_likelihood,
        lambda: by_hand(model, PAIRS),
    ):
        model.zero_grad()
        scores = score()
        (scores * weights).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.clues.parameters()])
        results.append((scores.detach(), gradient / gradient.norm()))
    for scores, gradient in results[:2]:
        torch.testing.assert_close(scores, results[2][0], rtol=0, atol=1e-5)
        torch.testing.assert_close(gradient, results[2][1], rtol=0, atol=1e-5)
    other = model_with(family, clues=clues, layout="document_first")
    assert (other.score(PAIRS).mean_query_log_likelihood - results[2][0]).abs().max() > 1e-3


def test_without_a_clue_the_prompt_is_that_of_the_other_layout():
    first, second = (model_with(layout=layout) for layout in ("clues_first", "document_first"))
    for model in (first, second):
        assert not model.compute_clues(model.encode([("ab", "")])).mask.any()
    scores = [model.score([("ab", "")]).query_log_likelihood for model in (first, second)]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-5)


def test_a_generated_lora_is_in_force_behind_the_document():
    model = model_with(generated_lora_rank=4)
    batch = model.encode([(QUERIES[0], DOCUMENTS[1])])
    read = []
    with torch.no_grad():
        for lora in (model.generated_lora, None):
            model.generated_lora = lora
            layer = model.lm.get_decoder().layers[0]
            handle = layer.register_forward_hook(lambda module, inputs, output: read.append(output))
            model(batch)
            handle.remove()
    changed = (read[0] != read[1]).any(-1)[0]
    suffix = len(model.prompt.suffix.question) + len(batch.queries[0]) - 1
    assert changed.tolist() == [False] * (len(changed) - suffix) + [True] * suffix


def test_nothing_is_shared_and_everything_says_so(tmp_path):
    model, cache = model_with(), qpeft.DocumentCache()
    assert "layout='clues_first'" in model.engine.why_not_cached
    scores = qpeft.Reranker(model, cache=cache).predict(PAIRS)
    assert len(cache) == 0
    assert scores == pytest.approx(model.score(PAIRS, path="plain").query_log_likelihood.numpy(), abs=1e-4)
    alone = [qpeft.Reranker(model, deterministic=True).predict(pair) for pair in PAIRS]
    assert alone == qpeft.Reranker(model, deterministic=True).predict(PAIRS).tolist()
    corpus = {"d": {"title": "", "text": "tides"}}
    with pytest.raises(ValueError, match="an index is of no use to this model: layout='clues_first'"):
        IndexWriter(model, corpus, tmp_path / "index")
    assert not (tmp_path / "index").exists()
    with IndexWriter(model_with(layout="document_first"), corpus, tmp_path / "index") as writer:
        writer.run(writer.survey())
    with pytest.raises(ValueError, match="an index is of no use to this model: layout='clues_first'"):
        qpeft.Reranker(model, cache=qpeft.DocumentCache(0, index=tmp_path / "index"))


def test_an_adapter_keeps_its_layout(tmp_path):
    model = model_with()
    model.save_pretrained(tmp_path)
    loaded = qpeft.QPeftModel.from_pretrained(tmp_path, tiny_lm("llama"), tiny_tokenizer())
    assert loaded.qpeft_config.layout == "clues_first"
    assert torch.equal(loaded.score(PAIRS).query_log_likelihood, model.score(PAIRS).query_log_likelihood)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layout": "prefix"}, "layout must be one of document_first, clues_first, query_first, got 'prefix'"),
        ({"layout": "clues_first", "clues": "none"}, "but clues='none' has none"),
    ],
)
def test_impossible_layouts_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        qpeft.QPeftConfig(**options)
