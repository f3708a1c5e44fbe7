"""GeneratedLora: the update is each query's own, on its suffix only, and leaves the LM as it was."""

from __future__ import annotations

import peft
import pytest
import torch
from families.tiny import DOCUMENTS, PAIRS, QUERIES, tiny_lm, tiny_tokenizer

import qpeft_ext as qpeft
from qpeft_ext.engine.rows import assemble_rows
from qpeft_ext.training.losses import pairwise

pytestmark = pytest.mark.slow


def model_with(lm=None, moved: bool = True, **options) -> qpeft.QPeftModel:
    config = qpeft.QPeftConfig(**{"clues": "none", "generated_lora_rank": 4, "num_heads": 4, "rank": 8} | options)
    model = qpeft.get_qpeft_model(lm or tiny_lm("llama"), config, tiny_tokenizer())
    torch.manual_seed(1)
    for parameter in model.generated_lora.parameters() if moved and model.generated_lora else ():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def scores(model, pairs=PAIRS, **options) -> torch.Tensor:
    return model.score(pairs, **options).query_log_likelihood


def test_it_starts_as_the_frozen_lm_and_leaves_it_as_it_was():
    expected = scores(model_with(generated_lora_rank=None))
    assert torch.equal(scores(model_with(moved=False)), expected)
    model = model_with()
    assert (scores(model) - expected).abs().max() > 0.1
    with pytest.raises(RuntimeError), model.engine.lm_passes.whole(model.generated_lora.updates(torch.ones(1, 4, 4))):
        raise RuntimeError("in the middle of a pass")
    assert not any(module._forward_hooks for module in model.lm.modules())
    assert not any(parameter.requires_grad for parameter in model.lm.parameters())
    model.generated_lora = None
    assert torch.equal(scores(model), expected)


def test_every_row_has_its_own_querys_update():
    model = model_with()
    together = scores(model)
    alone = torch.cat([scores(model, [pair]) for pair in PAIRS])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
    exact = torch.cat([scores(model, [pair], deterministic=True) for pair in PAIRS])
    assert torch.equal(scores(model, deterministic=True), exact)
    gates = model.generated_lora.gates([model.prompt.queries([query])[0] for query in QUERIES], model.engine.table)
    assert (gates[0] - gates[1]).abs().max() > 1e-3
    gradients = []
    for size in (None, 2):  # the recomputed suffixes have it as well
        model.qpeft_config.suffix_micro_batch = size
        model.zero_grad()
        model(model.encode(PAIRS)).query_log_likelihood.sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.generated_lora.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_it_is_the_same_with_and_without_gradients_and_under_autocast():
    model = model_with()
    recorded = model(model.encode(PAIRS)).query_log_likelihood
    with torch.no_grad():
        torch.testing.assert_close(model(model.encode(PAIRS)).query_log_likelihood, recorded, rtol=0, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(model.encode(PAIRS)).query_log_likelihood, recorded)


def test_a_layer_may_give_another_dtype_than_it_reads():
    """Of a quantised layer that is so; here by autocast around the LM itself."""
    model, found = model_with(), []
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    gates = model.generated_lora.gates([(5, 6), (7,)], model.engine.table).detach()
    for recorded in (True, False):  # not in place, and in place
        with (
            torch.autocast("cpu", torch.bfloat16),
            torch.set_grad_enabled(recorded),
            model.engine.lm_passes.whole(model.generated_lora.updates(gates)),
        ):
            found.append(model.lm(input_ids=ids).logits.detach().float())
    with torch.no_grad(), model.engine.lm_passes.whole(model.generated_lora.updates(gates)):
        expected = model.lm(input_ids=ids).logits
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[0], expected, rtol=5e-2, atol=0.2)


def test_prefixes_are_those_of_the_frozen_lm():
    """A cache filled without it serves it, and the other way round."""
    lm, cache = tiny_lm("llama"), qpeft.DocumentCache(1 << 24)
    plain, model = model_with(lm, generated_lora_rank=None), model_with(lm)
    scores(plain, cache=cache)
    cached = scores(model, cache=cache)
    assert cache.hits == len(DOCUMENTS) == len(cache)
    torch.testing.assert_close(cached, scores(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("target_modules", [None, "all-linear"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "peft"])
def test_merged_weights_give_the_same_suffixes(family, target_modules):
    lm = tiny_lm("llama" if family == "peft" else family)
    if family == "peft":
        lora = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        lm = peft.get_peft_model(lm, lora)
        lm.requires_grad_(False)
    model = model_with(lm, target_modules=target_modules)
    query, pairs = QUERIES[0], [(QUERIES[0], document) for document in DOCUMENTS]
    expected, merged = scores(model, pairs), model.merge_for(query)
    parameters = dict(lm.named_parameters())
    assert merged.keys() <= parameters.keys() and len(merged) == len(model.generated_lora.names)
    batch = model.encode(pairs)
    with torch.no_grad():
        prefix = model.engine.prefill([document.ids for document in batch.documents])  # with the unmerged weights
        for name, weight in merged.items():
            assert not torch.equal(parameters[name], weight)
            parameters[name].copy_(weight)
        rows = assemble_rows(batch, model.prompt.suffix, [0] * 4, model.device, with_prefix=False)
        log_p = model.engine.head.log_likelihood(model.engine.outputs(rows, None, prefix), rows.target_ids)
    torch.testing.assert_close(log_p.view(4, -1).sum(1), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_all_linear_updates_every_layer_but_the_head(family):
    model = model_with(tiny_lm(family), target_modules="all-linear")
    head = {name for name, module in model.lm.named_modules() if module is model.lm.get_output_embeddings()}
    linear = {name for name, module in model.lm.named_modules() if type(module).__name__ in ("Linear", "Conv1D")}
    assert set(model.generated_lora.names) == linear - head and head
    moved = scores(model)
    torch.testing.assert_close(scores(model, path="plain"), moved, rtol=0, atol=1e-4)
    assert (moved - scores(model_with(tiny_lm(family)))).abs().max() > 1e-3  # than with the default targets


@pytest.mark.parametrize("trained", [False, True])
def test_a_layer_with_an_adapter_is_one_layer(trained):
    """Not four: the linear layer in it, and the two of the LoRA, whose rank 2 has no room for an update of rank 4."""
    bare = model_with(tiny_lm("llama"), target_modules="all-linear")
    targets = ["q_proj", "down_proj"]
    lora = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=not trained)
    model = model_with(peft.get_peft_model(tiny_lm("llama"), lora), target_modules="all-linear")
    assert model.generated_lora.names == [f"base_model.model.{name}" for name in bare.generated_lora.names]
    assert len(model.merge_for(QUERIES[0])) == len(bare.generated_lora.names) == 14
    torch.testing.assert_close(scores(model, path="plain"), scores(model), rtol=0, atol=1e-4)
    change = (scores(model) - scores(bare)).abs().max()  # a new LoRA changes nothing
    assert change > 1e-2 if trained else change < 1e-4


def qwen2_moe():
    """A mixture of experts, of which the shared one reads all tokens in one list."""
    from transformers import AutoModelForCausalLM, Qwen2MoeConfig

    config = Qwen2MoeConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_experts=2,
        num_experts_per_tok=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        shared_expert_intermediate_size=8,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def endings(names) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


@pytest.mark.parametrize("family", ["opt", "qwen2_moe"])
def test_all_linear_leaves_out_layers_that_do_not_see_rows_apart(family):
    """And gates of one output, in which an update of rank 4 has no room."""
    lm = qwen2_moe() if family == "qwen2_moe" else tiny_lm(family)
    model = model_with(lm, target_modules="all-linear")
    own = {"opt": {"out_proj", "project_in", "project_out"}, "qwen2_moe": {"o_proj"}}[family]
    assert endings(model.generated_lora.names) == {"q_proj", "k_proj", "v_proj"} | own
    torch.testing.assert_close(scores(model, path="plain"), scores(model), rtol=0, atol=1e-4)


def test_a_named_target_that_does_not_see_rows_apart_is_refused():
    with pytest.raises(ValueError, match=r"fc1 reads \[10, 32\], expected \[2, L, D\].*leave it out of target_modules"):
        model_with(tiny_lm("opt"), target_modules=("q_proj", "fc1"))


def test_explanations_name_the_layers():
    norms = qpeft.Reranker(model_with(clues="top_k")).explain(*PAIRS[0]).gate_norms
    layers = [f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qv"]
    assert list(norms) == layers and all(norm > 0 for norm in norms.values())
    assert set(qpeft.Reranker(model_with(moved=False)).explain(*PAIRS[0]).gate_norms.values()) == {0.0}


def test_training_raises_the_margin_over_a_shuffled_document_on_held_out_queries():
    """What is learned is to read the document: unseen words, asked for in unseen documents."""
    model = model_with(moved=False, generated_lora_rank=8, instruction="",
                       target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"))  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    words = ["".join(chr(97 + int(i)) for i in torch.randint(0, 26, (3,), generator=generator)) for _ in range(136)]

    def table(some: list[str]) -> torch.Tensor:
        """[Q, 4]: each word as the query, its own document first, then three others'."""
        documents = [f"{word} {word}" for word in some]
        pairs = [(word, documents[(q + shift) % len(some)]) for q, word in enumerate(some) for shift in range(4)]
        return model(model.encode(pairs)).mean_query_log_likelihood.view(-1, 4)

    @torch.no_grad()
    def held_out_margin() -> float:
        scores = table(words[:40])
        return float((scores[:, 0] - scores[:, 1:].mean(1)).mean())

    before = held_out_margin()
    optimizer = torch.optim.Adam(model.generated_lora.parameters(), lr=5e-3)
    for step in range(60):
        start = 40 + step * 8 % 96
        likelihood = table(words[start : start + 8])
        positive = torch.zeros_like(likelihood, dtype=torch.bool)
        positive[:, 0] = True
        optimizer.zero_grad()
        pairwise(likelihood, positive, torch.ones_like(positive), 1.0).backward()
        optimizer.step()
    assert held_out_margin() > before + 0.3


@pytest.mark.parametrize("options, message", [
    ({"target_modules": ("q_porj",)}, "target module 'q_porj' is not a linear layer of this LM's decoder; did you"),
    ({"generated_lora_rank": 17}, "generated_lora_rank must be at most 16, the smaller side of model.layers.0."),
    ({"generated_lora_rank": 0}, "generated_lora_rank must be at least 1, got 0"),
    ({"loss": "pointwise"}, "loss='pointwise' alone would teach the generated LoRA the query itself"),
    ({"generated_lora_rank": None, "target_modules": ("q_proj",)}, "set generated_lora_rank"),
    ({"target_modules": ()}, "target_modules must be names of layers, got ()"),
])  # fmt: skip
def test_impossible_settings_are_errors(options, message):
    with pytest.raises(ValueError, match="^QPeftConfig: ") as error:
        model_with(**options)
    assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="the model has no generated LoRA"):
        model_with(generated_lora_rank=None).merge_for("a")
