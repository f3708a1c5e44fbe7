"""similarity_topk on CUDA (forward in C++, backward over `weighted_rows`) against the definition."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import make_documents, poisoned, to_float64
from on_cuda import assert_close, check_in_a_graph, cpu, same_bits
from test_similarity_topk import assert_scores_belong_to_clues

import qpeft_ext.ops as ops
from qpeft_ext.ops.similarity_topk import SimilarityTopK, reference, round_scores

pytestmark = pytest.mark.slow

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def check(run, x, k, metric="cosine"):
    """Compare with the definition in float64; return what the operator returned."""
    *result, norms = run("similarity_topk", *poisoned(x), k, metric)
    result = SimilarityTopK(*result)
    dtype = torch.float64 if x.table.dtype == torch.float64 else torch.float32
    truth = reference(*to_float64(x), k, metric)
    tolerance = {"rtol": 1e-5, "atol": 1e-5 * x.table.shape[1] ** 0.5}
    torch.testing.assert_close(result.scores.double(), truth.scores, **tolerance)
    found = truth.clue_ids >= 0
    assert result.scores.dtype == norms.dtype == dtype and torch.equal(result.clue_ids >= 0, found)
    assert torch.equal(result.scores, round_scores(result.scores))
    assert_scores_belong_to_clues(x, result, metric, **tolerance)
    rows = x.table[result.clue_ids[found]].to(dtype)
    length = torch.ones(len(rows), dtype=dtype) if metric == "dot" else rows.norm(dim=1)
    torch.testing.assert_close(norms[found], 1 / length, rtol=1e-5, atol=0)
    return result


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"Q": 1, "T": 1, "D": 1, "V": 1, "B": 1, "S": 1},
        {"Q": 9, "T": 16, "D": 72, "V": 300, "B": 20, "S": 60},  # two groups of queries, the second one smaller
        {"Q": 2, "T": 250, "D": 40, "V": 90, "B": 5, "S": 50},  # more tokens than a tile has columns
        {"Q": 1, "T": 12, "D": 600, "V": 500, "B": 4, "S": 200},
        {"B": 0},
        {"S": 0},
    ],
    ids=str,
)
def test_matches_reference(run, shape, dtype, metric):
    for k in (1, 30):
        check(run, make_documents(**shape, dtype=dtype), k, metric)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    Q=st.integers(1, 12), T=st.integers(1, 40), D=st.integers(1, 80), V=st.integers(1, 300), B=st.integers(0, 9),
    S=st.integers(0, 80), k=st.integers(1, 60), seed=st.integers(0, 999),
    dtype=st.sampled_from(DTYPES), metric=st.sampled_from(["cosine", "dot"]),
)  # fmt: skip
def test_any_shape(run, Q, T, D, V, B, S, k, seed, dtype, metric):
    check(run, make_documents(Q, T, D, V, B, S, dtype, seed=seed), k, metric)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 999), S=st.integers(1, 300), k=st.integers(1, 400), tiny=st.booleans())
def test_ties(run, seed, S, k, tiny):
    """With few different scores, exact in every order of summation, ids and positions must agree too."""
    random = torch.Generator().manual_seed(seed)
    x = make_documents(Q=3, T=4, D=3, V=200, B=4, S=S, seed=seed)
    table, queries = (torch.randint(-1, 2, y.shape, generator=random).float() for y in (x.table, x.query_embeds))
    x = x._replace(table=table * 1e-44 if tiny else table, query_embeds=queries)  # tiny: they round to 0 and -0
    assert_close(run("similarity_topk", *x, k, "dot")[:3], reference(*x, k, "dot"), 0)


# sorted whole; selected, then sorted
@pytest.mark.parametrize(("S", "k"), [(2048, 512), (2049, 1), (20_000, 512), (300_000, 512)])
def test_long_documents(run, S, k):
    x = make_documents(Q=2, T=3, D=8, V=6000, B=4, S=S)
    x = x._replace(table=(9 * x.table).round(), query_embeds=(9 * x.query_embeds).round())  # sums are exact, many ties
    ours, truth = run("similarity_topk", *x, k, "dot"), cpu.similarity_topk(*x, k, "dot")
    assert_close(ours, truth, 0)  # the CPU: the definition would compare every token with every other


def test_duplicates_and_ties_in_a_long_document(run):
    x = make_documents(Q=1, T=1, D=1, V=5000, B=1, S=10_000)
    x = x._replace(table=torch.arange(5000.0)[:, None] // 100, query_embeds=torch.ones(1, 1, 1))
    for k in (1, 99, 512, 4096):
        assert_close(run("similarity_topk", *x, k, "dot"), cpu.similarity_topk(*x, k, "dot"), 0)


def test_wrong_values_trap(replica):
    """A GPU cannot report a wrong value without waiting for it: the kernel stops instead of reading elsewhere."""
    x = make_documents()
    cases = {
        "document_ids": x.document_ids.masked_fill(x.document_mask, 29),
        "query_index": x.query_index + 3,
        "query_mask": x.query_mask & (torch.arange(3) != 1)[:, None],
        "table": x.table * torch.nan,
    }
    for name, value in cases.items():
        with pytest.raises(RuntimeError, match="similarity_topk: .*trap"):
            replica.similarity_topk(*x._replace(**{name: value}), 3, "cosine")
    for name, value, words in (
        ("table", x.table[:, :4], "query_embeds must have size 4"),
        ("document_mask", x.document_mask[:, 1:], "document_mask must have size 23"),
        ("query_mask", x.query_mask[:1], "query_mask must have size 3"),
    ):
        with pytest.raises(RuntimeError, match=words):
            replica.similarity_topk(*x._replace(**{name: value}), 3, "cosine")


def test_strides(replica):
    x = make_documents(D=16)
    wide, wider = torch.randn(29, 40), torch.randn(3, 5, 40)
    x = x._replace(table=wide[:, 3:19], query_embeds=wider[..., 7:23], document_ids=x.document_ids.T.contiguous().T)
    ours = replica.similarity_topk(*x, 4, "cosine")
    assert_close(ours, replica.similarity_topk(*(y.contiguous() for y in x), 4, "cosine"), 1e-6)


@pytest.mark.parametrize(("weighted", "accumulate"), [(True, False), (False, True)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("D", "padding"), [(1, 0), (37, 0), (300, 0), (37, 3), (2500, 4)])
def test_weighted_rows(run, replica, D, padding, dtype, weighted, accumulate):
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    source, weights = torch.randn(11, D + padding).to(dtype)[:, :D], torch.randn(60, dtype=sums)
    rows, out = torch.randint(0, 11, (60,)), torch.randn(4, D, dtype=sums)
    rows[[0, -1]] = torch.tensor([-1, 99])  # in no segment
    bounds = (1, 1), (1, 2), (2, 40), (40, 59)
    factors = weights if weighted else torch.ones_like(weights)
    truth = torch.stack([(factors[a:b, None] * source[rows[a:b]]).sum(0) for a, b in bounds])
    truth = truth + (out if accumulate else 0)
    arguments = source, rows, weights if weighted else None, torch.tensor([1, 1, 2, 40, 59]), accumulate
    (found,) = run("weighted_rows", *arguments, out if accumulate else out * torch.nan, outputs=(5,))
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)
    for ops_of_device in (cpu, replica):  # with the strides of source
        found = out.clone() if accumulate else out * torch.nan
        ops_of_device.weighted_rows(*arguments, found)
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="trap"):
        replica.weighted_rows(source, rows, None, torch.tensor([0, 1]), False, out[:1])


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_gradients(replica, monkeypatch, metric):
    """The operator with the CUDA functions below its autograd, in both orders of threads."""
    results = []
    for order in ("forward", "backward", None):
        x = poisoned(make_documents(D=40)) if order else make_documents(D=40)
        query, table = x.query_embeds.clone().requires_grad_(), x.table.clone().requires_grad_()
        x = x._replace(query_embeds=query, table=table)
        if order:
            monkeypatch.setenv("QPEFT_REPLICA_ORDER", order)
            with torch.library._scoped_library("qpeft_ext", "IMPL") as library:
                for name in ("similarity_topk", "weighted_rows"):
                    library.impl(name, getattr(replica, name), "CPU", allow_override=True)
                result = ops.similarity_topk(*x, 4, metric)
                grads = gradients(result, query, table)
        else:
            result = reference(*x, 4, metric)
            grads = gradients(result, query, table)
        results.append([*(y.detach() for y in result), *grads])
    same_bits(results[:2])
    assert_close(results[0], results[2], 1e-4)


def gradients(result, *inputs):
    weight = torch.linspace(-1, 1, result.scores.numel(), device=result.scores.device).view_as(result.scores)
    return torch.autograd.grad((result.scores.masked_fill(result.clue_ids < 0, 0) * weight).sum(), inputs)


@pytest.mark.cuda
@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_in_a_graph(dtype, metric):
    def step(*x):
        x = type(documents)(*x)
        query, table = x.query_embeds.clone().requires_grad_(), x.table.clone().requires_grad_()
        result = ops.similarity_topk(*x._replace(query_embeds=query, table=table), 4, metric)
        return *result, *gradients(result, query, table)

    documents, other = (make_documents(dtype=dtype, D=64, seed=seed) for seed in (0, 3))
    check_in_a_graph(step, documents, other)
