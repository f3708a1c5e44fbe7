"""TopKClues beyond the default: every source, random selection, clue embeddings, the trained choice."""

from __future__ import annotations

import logging

import pytest
import torch
from families.tiny import DOCUMENTS, QUERIES, tiny_lm, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

import qpeft_ext as qpeft
from qpeft_ext.adapters.inputs import ClueInputs
from qpeft_ext.ops import _common
from qpeft_ext.ops import vocabulary_topk as vocabulary
from qpeft_ext.ops.similarity_topk import round_scores
from qpeft_ext.ops.vocabulary_topk import vocabulary_topk

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def model_with(**options) -> qpeft.QPeftModel:
    config = qpeft.QPeftConfig(**{"clues": "top_k", "rank": 8, "k": 4} | options)
    return qpeft.get_qpeft_model(tiny_lm("llama"), config, tiny_tokenizer())


def clues_of(model, pairs, lists=None):
    return model.compute_clues(model.encode(pairs, lists), explain=True)


def texts(model, pairs, lists=None) -> list[str]:
    """The clue tokens of each pair as text; a token is a character."""
    ids = clues_of(model, pairs, lists).explanation["clue_ids"]
    return [model.tokenizer.decode(row[row >= 0].tolist()) for row in ids]


# -- candidates --------------------------------------------------------------------------------------------------


def test_candidates_give_one_list_per_query():
    model, document = model_with(source="candidates"), model_with()
    pairs = [("ab", "xyz"), ("ab", "klm"), ("kq", "xyz"), ("ab", "bcd")]
    first, second, other, last = texts(model, pairs)
    assert first == second == last != other
    # the list is that of the concatenated candidates, taken as one document
    joined = texts(document, [("ab", "xyz klm bcd"), ("kq", "xyz")])
    assert [first, other] == joined


def test_candidates_of_another_list_do_not_count():
    model = model_with(source="candidates")
    reranker = qpeft.Reranker(model)
    lists = [DOCUMENTS[:2], DOCUMENTS[2:], DOCUMENTS]
    together = reranker.rank_many([QUERIES[0]] * 3, lists)
    for documents, ranked in zip(lists, together, strict=True):
        alone = reranker.rank(QUERIES[0], documents)
        assert [row["corpus_id"] for row in alone] == [row["corpus_id"] for row in ranked]
        assert [row["score"] for row in alone] == pytest.approx([row["score"] for row in ranked], abs=1e-4)
    assert len({round(ranked[0]["score"], 3) for ranked in together}) > 1


def test_candidates_survive_every_way_of_scoring():
    """Deterministic scoring looks at one pair at a time, passes at a few: the list stays the query's own."""
    model = model_with(source="candidates")
    pairs = [(query, document) for query in QUERIES for document in DOCUMENTS]
    expected = model.score(pairs).query_log_likelihood
    for options in ({"deterministic": True}, {"max_tokens_per_batch": 64}, {"path": "plain"}):
        torch.testing.assert_close(model.score(pairs, **options).query_log_likelihood, expected, rtol=0, atol=1e-4)


def test_a_score_that_depends_on_the_list_is_no_pairs_own():
    with pytest.raises(ValueError, match="source='candidates' a score depends on all candidates.*use rank"):
        qpeft.Reranker(model_with(source="candidates")).predict([("a", "b")])


# -- vocabulary --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    metric=st.sampled_from(["cosine", "dot"]),
    per_token=st.booleans(),
    k=st.integers(1, 12),
    rows=st.sampled_from([1, 3, 50]),
    own_masks=st.booleans(),
    onednn=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_vocabulary_topk_equals_a_full_sort(set_up, seed, metric, per_token, k, rows, own_masks, onednn, dtype):
    set_up(rows, onednn)
    generator = torch.Generator().manual_seed(seed)
    Q, T, V, D = 2, 3, 9, 4
    # whole numbers: ties, and zero rows
    table = torch.randint(-1, 2, (V, D), generator=generator).float()
    queries = torch.randint(-1, 2, (Q, T, D), generator=generator).float()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    allowed = torch.rand(Q if own_masks else 1, V, generator=generator) < 0.7
    garbage = queries.masked_fill(~mask[..., None], torch.nan)
    found = vocabulary_topk(garbage.to(dtype), mask, table.to(dtype), allowed, k, metric, per_token)
    if metric == "cosine":
        table, queries = (torch.nn.functional.normalize(x, dim=-1, eps=1e-30) for x in (table, queries))
    similarity = round_scores((queries @ table.T).contiguous()) + 0.0  # [Q, T, V]
    for q in range(Q):
        tokens = range(T) if per_token else [None]
        for t in tokens:
            scores = similarity[q, t] if per_token else similarity[q][mask[q]].amax(0)
            best = sorted((-float(scores[u]), u) for u in range(V) if allowed[q if own_masks else 0, u])
            expected = [u for _, u in best][:k] if t is None or mask[q, t] else []
            row = (found[q, t] if per_token else found[q]).tolist()
            assert row == expected + [-1] * (k - len(expected))


@pytest.mark.parametrize(("Q", "T", "k", "V"), [(0, 2, 3, 5), (2, 0, 3, 5), (2, 2, 0, 5), (2, 2, 3, 0)])
@pytest.mark.parametrize("per_token", [False, True])
def test_vocabulary_topk_of_nothing(Q, T, k, V, per_token):
    mask, allowed = torch.ones(Q, T, dtype=torch.bool), torch.ones(1, V, dtype=torch.bool)
    found = vocabulary_topk(torch.ones(Q, T, 4), mask, torch.ones(V, 4), allowed, k, per_token=per_token)
    assert found.dtype == torch.int64 and (found == -1).all()
    assert found.shape == ((Q, T, k) if per_token else (Q, k))


@pytest.fixture(scope="module")
def set_up():
    """Rows of a chunk, and whether oneDNN multiplies them."""
    with pytest.MonkeyPatch.context() as monkeypatch:

        def change(rows: int, onednn: bool) -> None:
            monkeypatch.setattr(vocabulary, "_MOST_ROWS", rows)
            monkeypatch.setattr(vocabulary, "_MOST_UPCAST_ROWS", rows)
            monkeypatch.setattr(_common, "_has_onednn", lambda: onednn and torch.backends.mkldnn.is_available())

        yield change


@pytest.mark.parametrize("source", ["vocabulary", "vocabulary_per_token"])
def test_a_nan_in_the_table_is_an_error(source):
    model = model_with(source=source)
    with torch.no_grad():
        model.engine.table[77, 3] = torch.nan
    with pytest.raises(ValueError, match="a similarity is NaN"):
        clues_of(model, [("ab", "xyz")])


def test_the_whole_vocabulary_is_expansion_without_a_document():
    model = model_with(source="vocabulary", filters=("query_tokens",))
    found = clues_of(model, [("ab", "xyz"), ("ab", ""), ("q", "xyz")])
    ids = found.explanation["clue_ids"]
    assert found.mask.all() and ids[0].equal(ids[1]) and not ids[0].equal(ids[2])
    table, unit = model.engine.table, torch.nn.functional.normalize
    query = list(model.prompt.queries(["ab"])[0])
    similarity = (unit(table[query]) @ unit(table).T).amax(0)
    similarity[[*query, *model.tokenizer.all_special_ids]] = -1
    expected = similarity.topk(4)
    assert ids[0].tolist() == expected.indices.tolist()
    torch.testing.assert_close(found.explanation["scores"][0], expected.values, rtol=0, atol=1e-4)
    # without the filter a query's own tokens are the nearest
    assert set(texts(model_with(source="vocabulary", k=3), [("ab", "xyz")])[0]) == set(" ab")


def test_each_query_token_has_its_own_neighbours():
    model = model_with(source="vocabulary_per_token", k=3)
    found = clues_of(model, [("a", "xyz"), ("abc", "")])
    table, unit = model.engine.table, torch.nn.functional.normalize
    assert found.mask.sum(1).tolist() == [3 * 2, 3 * 4]  # of the space before a query as well
    for row, query in enumerate(("a", "abc")):
        tokens = list(model.prompt.queries([query])[0])
        similarity = unit(table[tokens]) @ unit(table).T
        similarity[torch.arange(len(tokens)), tokens] = -1  # a token is not its own neighbour
        similarity[:, model.tokenizer.all_special_ids] = -1
        facts = {name: fact[row][found.mask[row]] for name, fact in found.explanation.items()}
        assert facts["clue_ids"].view(-1, 3).equal(similarity.topk(3).indices)
        assert facts["query_positions"].view(-1, 3).equal(torch.arange(len(tokens))[:, None].expand(-1, 3))


# -- random ------------------------------------------------------------------------------------------------------


def test_random_selection_is_a_function_of_seed_and_pair():
    first, other = (model_with(selection="random", seed=seed) for seed in (0, 1))
    pairs = [("ab", LETTERS), ("cd", LETTERS), ("ab", LETTERS + "a"), ("ab", "xx")]
    together = texts(first, pairs)
    assert together == [texts(first, [pair])[0] for pair in pairs]  # padding and neighbours do not matter
    assert len(set(together[:3])) == 3 and texts(other, pairs[:1]) != together[:1]
    assert sorted(together[3]) == [" ", "x"] and all(len(set(text)) == 4 for text in together[:3])
    # every token is as likely as any other
    counts = torch.zeros(256)
    for row in clues_of(first, [(f"query {i}", LETTERS) for i in range(600)]).explanation["clue_ids"]:
        counts[row] += 1
    chosen = counts[counts > 0]
    assert len(chosen) == 27 and float(chosen.min()) > 60 and float(chosen.max()) < 120  # 600 · 4 / 27 = 89 expected


# -- clue embeddings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, more", [("frozen", 0), ("low_rank", 260 * 8 + 8 * 32), ("full", 260 * 32)])
def test_clue_embeddings_start_as_the_table_and_are_counted(kind, more, caplog, capsys):
    pairs = [(query, document) for query in QUERIES for document in DOCUMENTS]
    with caplog.at_level(logging.WARNING):
        model = model_with(clue_embeddings=kind)
    assert ("trains a copy of the embedding table: 8,320 parameters" in caplog.text) == (kind == "full")
    plain = model_with()
    torch.testing.assert_close(clues_of(model, pairs).embeds, clues_of(plain, pairs).embeds)
    trained = 2 * 32 * 8 + 8 + 32 + more
    assert model.get_nb_trainable_parameters()[0] == trained
    model.print_trainable_parameters()
    assert f"trainable params: {trained:,} ||" in capsys.readouterr().out
    table = model.engine.table.clone()
    model.train()(model.encode(pairs)).mean_query_log_likelihood.sum().backward()
    moved = [p for name, p in model.clues.named_parameters() if name.startswith("embeddings.")]
    assert len(moved) == {"frozen": 0, "low_rank": 2, "full": 1}[kind]
    assert not moved or bool(moved[0].grad.any())
    assert model.engine.table.grad is None and torch.equal(model.engine.table, table)


# -- the trained choice ------------------------------------------------------------------------------------------


def test_the_gate_is_relative_to_the_clues_that_are_there():
    model = model_with(k=6, score_gate=True)
    with torch.no_grad():
        model.clues.gate.copy_(torch.tensor([1.5, 0.3]))
    clues = clues_of(model, [("ab", "xy"), ("ab", "a text of many letters"), ("ab", "")])
    assert 0 < int(clues.mask[0].sum()) < 6 == int(clues.mask[1].sum()) and not clues.mask[2].any()
    for row in range(2):
        there = clues.mask[row]
        scores = clues.explanation["scores"][row, there].double()
        expected = 2 / (1 + (-1.5 * (scores - scores.mean()) - 0.3).exp())
        torch.testing.assert_close(clues.explanation["gates"][row, there].double(), expected, rtol=1e-5, atol=1e-6)
    assert clues.embeds.isfinite().all()


@pytest.mark.parametrize("source", ["document", "candidates", "vocabulary", "vocabulary_per_token"])
@pytest.mark.slow
def test_gradcheck_through_the_choice(source):
    """The scores of the chosen clues are differentiable: the loss reaches e_q, the gate, and the tables."""
    torch.manual_seed(0)
    table = torch.randn(12, 4, dtype=torch.float64)
    config = qpeft.QPeftConfig(clues="top_k", k=2, rank=2, source=source, score_gate=True, clue_embeddings="low_rank")
    module = qpeft.TopKClues(config, table, torch.ones(12, dtype=torch.bool)).train()
    for parameter in module.parameters():  # `module.double()` leaves trained modules in float32
        parameter.data = parameter.data.double() + 0.3 * torch.randn_like(parameter, dtype=torch.float64)
    documents = torch.randint(0, 12, (2 if source == "candidates" else 3, 7))
    inputs = ClueInputs(torch.randint(0, 12, (2, 3)), torch.tensor([[True] * 3, [True] * 2 + [False]]),
                        documents, torch.rand(documents.shape) < 0.9, torch.tensor([0, 1, 1]))  # fmt: skip
    names, values = zip(*module.named_parameters(), strict=True)

    def clues(*parameters):
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(module, state, (inputs, table, 1.5)).embeds

    assert clues(*values).shape[1] == (3 * 4 if source == "vocabulary_per_token" else 4)  # training chooses 2k
    assert torch.autograd.gradcheck(clues, values)
    clues(*values).pow(2).sum().backward()
    assert bool(module.query_projection.a.grad.any()) and bool(module.gate.grad.all())
    assert module.eval()(inputs, table, 1.5).embeds.shape[1] == (3 * 2 if source == "vocabulary_per_token" else 2)


@pytest.mark.slow
def test_training_corrects_a_choice_that_the_frozen_embeddings_get_wrong():
    """Useful tokens share a weak direction with the query, distractors a strong one: e_q learns which matters.

    Held-out tokens have the same structure, so what is learned is the projection and not the tokens.
    """
    torch.manual_seed(0)
    V, D, k, topics = 1200, 16, 2, 6
    weak, strong = torch.randint(0, topics, (2, V))
    directions = torch.linalg.qr(torch.randn(D, 2 * topics)).Q.T
    table = 0.5 * directions[weak] + directions[topics + strong] + 0.05 * torch.randn(V, D)
    config = qpeft.QPeftConfig(clues="top_k", k=k, rank=8, score_gate=True, similarity="dot")
    module = qpeft.TopKClues(config, table, torch.ones(V, dtype=torch.bool))

    def batch(low: int, high: int, size: int = 32):
        """Queries of one token; documents of 3 useful tokens, 3 distractors and 6 others, ids from [low, high)."""
        queries, documents, useful = torch.randint(low, high, (size, 1)), [], []
        ids = torch.arange(low, high)
        for (query,) in queries.tolist():
            same, near = weak[ids] == weak[query], strong[ids] == strong[query]
            parts = [ids[kind][torch.randperm(int(kind.sum()))[:n]] for kind, n in
                     ((same & ~near, 3), (~same & near, 3), (~same & ~near, 6))]  # fmt: skip
            row = torch.cat(parts)[torch.randperm(12)]
            documents.append(row), useful.append(weak[row] == weak[query])
        documents = torch.stack(documents)
        masks = (torch.ones_like(x, dtype=torch.bool) for x in (queries, documents))
        inputs = ClueInputs(queries, next(masks), documents, next(masks), torch.arange(size))
        return inputs, torch.stack(useful)

    def recall() -> float:
        inputs, useful = batch(V // 2, V, 300)
        chosen = module.eval().select(inputs, table).clue_ids
        hits = (inputs.document_ids[:, :, None] == chosen[:, None, :]).any(2) & useful
        return float(hits.sum() / (k * len(chosen)))

    frozen = recall()
    optimizer = torch.optim.Adam([*module.query_projection.parameters(), module.gate], lr=2e-2)
    for _ in range(80):
        inputs, _ = batch(0, V // 2)
        clues = module.train()(inputs, table, 1.0).embeds
        wanted = directions[weak[inputs.query_ids[:, 0]]]  # a reader that profits from the weak direction only
        optimizer.zero_grad()
        (-(clues.sum(1) * wanted).sum(1).mean()).backward()
        optimizer.step()
    assert frozen < 0.1 and recall() > 0.9


# -- wrong options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, message", [
    ({"source": "corpus"}, "source must be one of document, candidates, vocabulary, vocabulary_per_token, got"),
    ({"clue_embeddings": "lowrank"}, "did you mean 'low_rank'"),
    ({"clues": "attention", "source": "candidates"}, "source='candidates' needs clues='top_k', got clues='attention'"),
    ({"clues": "none", "score_gate": True}, "score_gate=True needs clues='top_k'"),
    ({"clues": "attention", "clue_embeddings": "full"}, "clue_embeddings='full' needs clues='top_k'"),
    ({"clues": "attention", "selection": "random"}, "selection='random' needs clues='top_k'"),
    ({"clues": "none", "similarity": "dot"}, "similarity='dot' needs clues='top_k'"),
    ({"selection": "random", "source": "vocabulary"}, "selection='random' needs source='document' or 'candidates'"),
    ({"selection": "random", "score_gate": True}, "no scores that score_gate=True could train"),
])  # fmt: skip
def test_impossible_settings_are_errors(options, message):
    with pytest.raises(ValueError) as error:
        model_with(**options)
    assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(TypeError, match="score_gate must be True or False, got 'yes'"):
        model_with(score_gate="yes")
