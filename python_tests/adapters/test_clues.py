"""Clue modules: what is selected, what is trained, what the filters drop."""

import sys
from collections import OrderedDict

import pytest
import torch
from families.tiny import tiny_lm, tiny_tokenizer

import qpeft_ext as qpeft
from qpeft_ext.adapters.filters import allowed_ids
from qpeft_ext.adapters.projected_rows import ProjectedRows
from qpeft_ext.lm import state
from qpeft_ext.ops._library import REFERENCE

QUERY = "ab"


def model_with(**options) -> qpeft.QPeftModel:
    config = qpeft.QPeftConfig(**{"num_heads": 4, "rank": 8} | options)
    return qpeft.get_qpeft_model(tiny_lm("llama"), config, tiny_tokenizer())


def clue_text(model, document: str, query: str = QUERY) -> str:
    """The clue tokens of a pair as text; with the byte-level test tokenizer a token is a character."""
    clues = model.compute_clues(model.encode([(query, document)]), explain=True)
    ids = clues.explanation["clue_ids"][0]
    assert (ids >= 0).equal(clues.mask[0])
    return model.tokenizer.decode(ids[ids >= 0].tolist())


def test_tokens_of_the_query_come_first_and_once():
    model = model_with(clues="top_k", k=3)
    text = clue_text(model, "xbaabbax")
    assert set(text[:3].strip()) <= set("ab ") and len(set(text)) == 3


def test_fewer_tokens_than_k_give_fewer_clues():
    model = model_with(clues="top_k", k=10)
    assert sorted(clue_text(model, "xyx")) == [" ", "x", "y"]


def test_an_empty_document_gives_no_clue_and_no_header():
    for clues in ("top_k", "attention"):
        model = model_with(clues=clues)
        found = model.compute_clues(model.encode([(QUERY, "")]))
        assert not found.mask.any() and torch.equal(found.embeds, torch.zeros_like(found.embeds))
        upr = model_with(clues="none").score([(QUERY, "")]).query_log_likelihood
        assert torch.equal(model.score([(QUERY, "")]).query_log_likelihood, upr)


def test_query_token_filter():
    model = model_with(clues="top_k", k=3, filters=("query_tokens",))
    assert not set(clue_text(model, "abxayb")) & set("ab ")


def test_the_query_filter_is_each_pairs_own():
    model = model_with(clues="top_k", k=2, filters=("query_tokens",))
    batch = model.encode([("ab", "abxy"), ("xy", "abxy")])
    ids = model.compute_clues(batch, explain=True).explanation["clue_ids"]
    assert [set(model.tokenizer.decode(row.tolist())) for row in ids] == [set("xy"), set("ab")]


def test_all_tokens_filtered_gives_no_clue_and_a_finite_score():
    model = model_with(clues="top_k", k=3, filters=("query_tokens",))
    assert clue_text(model, "abba") == ""
    assert torch.isfinite(model.score([(QUERY, "abba")]).query_log_likelihood).all()


def test_special_tokens_are_never_clues():
    assert "<s>" not in clue_text(model_with(clues="top_k", k=9), "a<s>b")


def test_filters_look_at_decoded_pieces():
    tokenizer = tiny_tokenizer()
    letter, space, comma = (tokenizer.convert_tokens_to_ids(t) for t in ("a", "Ġ", ","))
    plain = allowed_ids(tokenizer, 260)
    assert plain[[letter, space, comma]].tolist() == [True] * 3 and not plain[:2].any()
    assert allowed_ids(tokenizer, 260, ("non_alphabetic",))[[letter, space, comma]].tolist() == [True, False, False]
    assert allowed_ids(tokenizer, 260, ("stop_words",))[[letter, space, comma]].tolist() == [False, True, True]


def test_attention_gives_one_clue_per_query_token_and_its_weights():
    model = model_with(clues="attention")
    batch = model.encode([("abc", "some text"), ("a", "x")])
    clues = model.compute_clues(batch, explain=True)
    assert clues.mask.sum(1).tolist() == [len(q) for q in batch.queries]
    weights = clues.explanation["weights"]  # [B, H, T, S]
    assert weights.shape == (2, 4, 4, 10)
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(4, 4))


@pytest.mark.parametrize("clues", ["attention", "top_k"])
def test_clue_modules_start_at_the_identity(clues):
    """Before training: the clue is a table row (top_k), or a weighted mean of table rows (attention)."""
    model = model_with(clues=clues, k=4)
    batch = model.encode([("abc", "some text")])
    found = model.compute_clues(batch, explain=True)
    table = model.engine.table
    if clues == "top_k":
        expected = table[found.explanation["clue_ids"][0]]
        torch.testing.assert_close(found.embeds[0], expected)
    else:
        heads = found.explanation["weights"][0]  # [H, T, S]
        rows = table[list(batch.documents[0].document_ids)].view(-1, 4, 8)  # [S, H, D / H]
        torch.testing.assert_close(found.embeds[0], torch.einsum("hts,shd->thd", heads, rows).flatten(1))


def multihead_attention(bias: bool = True) -> torch.nn.MultiheadAttention:
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(32, 4, bias=bias, batch_first=True)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return attention


def expect_equal(model, attention) -> None:
    """The clues of a few pairs are the MLP of what ``attention`` gives for the pairs one by one."""
    batch = model.encode([("abc", "some text"), ("q", "another one, longer"), ("abc", "x")])
    found, table = model.compute_clues(batch), model.engine.table
    with torch.no_grad():
        for i, (q, d) in enumerate(batch.pairs):
            rows = table[list(batch.documents[d].document_ids)][None]
            mixed, _ = attention(table[list(batch.queries[q])][None], rows, rows)
            torch.testing.assert_close(found.embeds[i][found.mask[i]], model.clues.mlp(mixed)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [8, None])
def test_attention_clues_equal_multihead_attention(rank, bias):
    model = model_with(clues="attention", rank=rank, attention_bias=bias)
    for parameter in model.clues.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    module, attention = model.clues, multihead_attention(bias)
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([p.matrix(torch.float32) for p in (module.q, module.k, module.v)]))
        attention.out_proj.weight.copy_(module.o.matrix(torch.float32))
        if bias:
            attention.in_proj_bias.copy_(torch.cat([p.bias for p in (module.q, module.k, module.v)]))
            attention.out_proj.bias.copy_(module.o.bias)
    expect_equal(model, attention)


@pytest.mark.parametrize("bias", [True, False])
def test_the_state_of_a_multihead_attention_can_be_loaded(bias):
    model = model_with(clues="attention", rank=None)  # with biases, which are zero for an attention without
    torch.nn.init.normal_(model.clues.mlp.down.weight, std=0.1)
    before = model.clues.mlp.down.weight.clone()
    model.clues.load_state_dict(multihead_attention(bias).state_dict())
    expect_equal(model, multihead_attention(bias))
    assert torch.equal(model.clues.mlp.down.weight, before)
    model.clues.load_state_dict(model.clues.state_dict())  # its own state still fits
    state = multihead_attention().state_dict()
    with pytest.raises(ValueError, match="these AttentionClues have rank 8; use rank=None"):
        model_with(clues="attention").clues.load_state_dict(state)
    with pytest.raises(ValueError, match="has biases, .*attention_bias=True"):
        model_with(clues="attention", rank=None, attention_bias=False).clues.load_state_dict(state)


def test_attention_looks_past_filtered_tokens():
    model = model_with(clues="attention", filters=("query_tokens", "non_alphabetic"))
    batch = model.encode([("ab", "xbay, q"), ("xy", "xbay, q"), ("xy", "yx, x")])
    found = model.compute_clues(batch, explain=True)
    seen = found.explanation["weights"].sum((1, 2)) > 0  # [B, S]
    texts = [model.tokenizer.decode(batch.documents[d].document_ids) for _, d in batch.pairs]
    attended = ["".join(c for c, s in zip(text, row, strict=False) if s) for text, row in zip(texts, seen, strict=True)]
    assert attended == ["xyq", "baq", ""]
    assert found.mask.any(1).tolist() == [True, True, False]
    assert torch.isfinite(model.score([("xy", "yx, x")]).query_log_likelihood).all()


def test_trainable_parameters_are_the_clue_module_alone():
    model = model_with(clues="attention")
    projections = 4 * (2 * 32 * 8 + 32)
    mlp = 2 * 32 * 8 + 8 + 32
    assert model.get_nb_trainable_parameters()[0] == projections + mlp
    assert model_with(clues="none").get_nb_trainable_parameters()[0] == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"clues": "top-k"}, "clues must be one of attention, top_k, none, got 'top-k'; did you mean 'top_k'"),
        ({"k": 0}, "k must be at least 1, got 0"),
        (
            {"num_heads": 5, "rank": 8},
            "num_heads must divide the embedding width 32, got 5; possible: 1, 2, 4, 8, 16, 32",
        ),
        ({"num_heads": 4, "rank": 64}, "rank must be at most the embedding width 32, got 64"),
        ({"filters": ("stopwords",)}, "filters must be one of"),
        ({"loss": "hinge"}, "loss must be one of"),
        ({"dropout": 1.5}, "dropout must be in"),
    ],
)
def test_impossible_settings_are_errors(options, message):
    with pytest.raises(ValueError, match="QPeftConfig: .*") as error:
        qpeft.get_qpeft_model(tiny_lm("llama"), qpeft.QPeftConfig(**options), tiny_tokenizer())
    assert message in str(error.value)


@pytest.mark.skipif(REFERENCE, reason="the PyTorch definitions project nothing in advance")
def test_projected_rows_give_the_same_clues_and_notice_new_weights():
    model = model_with(clues="attention")
    batch = model.encode([("abc", "some text"), ("a", "x"), ("b", "")])
    with torch.no_grad():
        for parameter in model.clues.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        rows = ProjectedRows(1 << 20)
        for _ in range(2):
            expected = model.compute_clues(batch).embeds
            for _ in range(2):
                found = model.compute_clues(batch, projected=rows).embeds
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert 0 < rows.used_bytes <= 1 << 20
            model.clues.v.a.add_(0.3)  # the rows projected so far are stale now


@pytest.fixture
def no_optimizer_was_noticed(monkeypatch):
    """Make this process like a new one, in which nothing counts the steps of optimizers yet."""
    monkeypatch.setattr(sys.modules["torch.optim.optimizer"], "_global_optimizer_post_hooks", OrderedDict())
    state._count_optimizer_steps.cache_clear()
    yield
    state._count_optimizer_steps.cache_clear()


@pytest.mark.parametrize("fused", [False, True])
def test_a_reranker_notices_a_training_step(fused, no_optimizer_was_noticed):
    """The default optimizer of `TrainingArguments` is a fused one, which writes without counting."""
    model = model_with(clues="attention")
    pairs = [("abc", "some text"), ("a", "x")]
    reranker = qpeft.Reranker(model)
    before = reranker.predict(pairs)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=fused)
    for _ in range(2):  # after the first step I + A·B is the identity still
        optimizer.zero_grad()
        model(model.encode(pairs)).compared.mean().neg().backward()
        optimizer.step()
    expected = model.score(pairs).query_log_likelihood
    torch.testing.assert_close(torch.tensor(reranker.predict(pairs)), expected, rtol=0, atol=1e-4)
    assert abs(float(expected[0]) - before[0]) > 0.01


@pytest.mark.parametrize("clues", ["top_k", "attention"])
def test_the_clue_mlp_without_its_residual_path(clues):
    config = qpeft.QPeftConfig(clues=clues, num_heads=4, residual=False)
    mlp = qpeft.get_qpeft_model(tiny_lm("llama"), config, tiny_tokenizer()).clues.mlp
    x = torch.randn(3, 32)
    torch.testing.assert_close(mlp(x), mlp.down(torch.relu(mlp.up(x))))
    assert mlp.down.weight.abs().min() > 0  # zeros would give the same clue for every token
    with pytest.raises(ValueError, match="residual=False is of the clue MLP"):
        qpeft.QPeftConfig(clues="none", residual=False)
