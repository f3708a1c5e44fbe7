import pytest
import torch
from inputs import make_documents, poisoned, to_float64

from qpeft_ext.ops import similarity_topk
from qpeft_ext.ops._library import registered
from qpeft_ext.ops.similarity_topk import reference

SHAPES = [
    {},
    {"Q": 1, "T": 1, "D": 1, "V": 1, "B": 1, "S": 1},
    {"Q": 2, "T": 17, "D": 33, "V": 7, "B": 9, "S": 300},  # every document holds nearly every id, many times
    {"Q": 5, "T": 3, "D": 65, "V": 3000, "B": 40, "S": 70, "seed": 1},
    {"B": 0},
    {"S": 0},
]


def run(x, k=4, metric="cosine", function=similarity_topk):
    return function(*x, k, metric)


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, metric, device):
    x = make_documents(**shape, dtype=dtype, device=device)
    for k in (1, 10):
        result, truth = run(x, k, metric), run(to_float64(x), k, metric, reference)
        tolerance = {"rtol": 1e-5, "atol": 1e-5 * x.table.shape[1] ** 0.5}  # dot: a sum of D products of size 1
        torch.testing.assert_close(result.scores.double(), truth.scores, **tolerance)
        assert result.scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(result.clue_ids < 0, truth.clue_ids < 0)
        # ids may only differ where scores tie: the score of the id that was given must be the score that was given
        assert_scores_belong_to_clues(x, result, metric, **tolerance)


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_matches_reference_in_several_blocks(dtype, metric, device, small_blocks):
    test_matches_reference({"Q": 1, "T": 2, "D": 50, "V": 900, "B": 3, "S": 400}, dtype, metric, device)


def assert_scores_belong_to_clues(x, result, metric, **tolerance):
    found = result.clue_ids >= 0
    pair = found.nonzero()[:, 0]
    query = x.query_embeds.double()[x.query_index[pair], result.query_positions[found]]
    row = x.table.double()[result.clue_ids[found]]
    score = (query * row).sum(-1)
    if metric == "cosine":
        score = score / (query.norm(dim=-1) * row.norm(dim=-1))
    torch.testing.assert_close(result.scores[found].double(), score, **tolerance)
    assert x.query_mask[x.query_index[pair], result.query_positions[found]].all()
    in_document = (x.document_ids[:, None, :] == result.clue_ids[:, :, None]) & x.document_mask[:, None, :]
    assert torch.equal(in_document.any(-1), found)
    assert (result.query_positions[~found] == -1).all() and (result.scores[~found] == -torch.inf).all()
    ids = result.clue_ids.where(found, -1 - torch.arange(found.shape[1], device=found.device))
    assert all(len(set(row)) == len(row) for row in ids.tolist())


def test_ties_go_to_the_earlier_token(device):
    x = make_documents(Q=1, T=3, B=1, S=6, V=6, D=4, device=device)
    x = x._replace(
        table=torch.ones(6, 4, device=device),
        query_embeds=torch.ones(1, 3, 4, device=device),
        query_mask=torch.tensor([[False, True, True]], device=device),
        document_ids=torch.tensor([[2, 5, 3, 5, 0, 3]], device=device),
        document_mask=torch.tensor([[False, True, True, True, True, True]], device=device),
    )
    result = run(x, k=5)
    assert result.clue_ids.tolist() == [[5, 3, 0, -1, -1]]  # a later 5 must not hide the 0
    assert result.query_positions.tolist() == [[1, 1, 1, -1, -1]]
    assert result.scores.tolist() == [[1, 1, 1, -torch.inf, -torch.inf]]


def test_larger_scores_come_first_and_zero_rows_have_cosine_zero(device):
    table = torch.tensor([[1.0, 0], [0, 0], [-1, 0], [3, 3]], device=device)
    x = make_documents(Q=1, T=1, D=2, V=4, B=1, S=4, device=device)
    x = x._replace(table=table, query_embeds=table[None, :1] * 7)
    x = x._replace(document_ids=torch.tensor([[2, 1, 3, 0]], device=device), document_mask=x.document_mask | True)
    result = run(x)
    assert result.clue_ids.tolist() == [[0, 3, 1, 2]]
    torch.testing.assert_close(result.scores.cpu(), torch.tensor([[1, 0.5**0.5, 0, -1]]))
    zero_query = run(x._replace(query_embeds=torch.zeros_like(x.query_embeds)))
    assert zero_query.scores.tolist() == [[0, 0, 0, 0]] and zero_query.clue_ids.tolist() == [[2, 1, 3, 0]]


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_masked_tokens_do_not_matter(metric, device):
    x = make_documents(device=device)
    clean, noisy = run(x, metric=metric), run(poisoned(x), metric=metric)
    assert all(torch.equal(a, b) for a, b in zip(clean, noisy, strict=True))


def test_pairs_do_not_depend_on_each_other(device):
    x = make_documents(device=device)
    together = run(x)
    for b in range(len(x.query_index)):
        single = run(x._replace(**{name: getattr(x, name)[b : b + 1] for name in x._fields[3:]}))
        assert torch.equal(single.clue_ids, together.clue_ids[b : b + 1])
        torch.testing.assert_close(single.scores, together.scores[b : b + 1], rtol=1e-6, atol=1e-6)


def test_dense_embeddings_are_ids_in_order(device):
    x = make_documents(Q=1, B=1, S=29, V=29, device=device)
    x = x._replace(document_ids=torch.arange(29, device=device)[None], document_mask=x.document_mask | True)
    similarity = x.query_embeds[0, :1] @ x.table.T  # Q = 1: one query token
    torch.testing.assert_close(run(x, 29, "dot").scores, similarity.sort(descending=True).values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_gradient(metric, device):
    x = make_documents(Q=2, T=3, D=4, V=11, B=5, S=6, dtype=torch.float64, device=device)

    def scores(query_embeds, table):
        result = run(x._replace(query_embeds=query_embeds, table=table), 3, metric).scores
        return result.masked_fill(result == -torch.inf, 0)

    inputs = [x.query_embeds.requires_grad_(), x.table.requires_grad_()]
    assert torch.autograd.gradcheck(scores, inputs)
    masked = torch.autograd.grad(scores(*inputs).sum(), inputs[0])[0][~x.query_mask]
    assert (masked == 0).all()


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_matches_reference(dtype, metric, device):
    x = poisoned(make_documents(D=40, dtype=dtype, device=device))
    low = dtype == torch.bfloat16  # gradients are rounded to it
    tolerance = {"rtol": 2e-2 if low else 1e-4, "atol": 1e-2 if low else 1e-5}
    grads = []
    for function in (similarity_topk, reference):
        y = x if function is similarity_topk else make_documents(D=40, dtype=dtype, device=device)
        y = y._replace(query_embeds=y.query_embeds.clone().requires_grad_(), table=y.table.clone().requires_grad_())
        result = run(y, 4, metric, function)
        weight = torch.linspace(-1, 1, result.scores.numel(), device=device).view_as(result.scores)
        (result.scores.masked_fill(result.clue_ids < 0, 0) * weight).sum().backward()
        grads.append((y.query_embeds.grad, y.table.grad))
    for ours, truth in zip(*grads, strict=True):
        torch.testing.assert_close(ours, truth, **tolerance)


def test_zero_vectors_get_no_gradient_through_the_cosine(device):
    x = make_documents(Q=1, T=1, device=device)
    query = torch.zeros_like(x.query_embeds).requires_grad_()
    run(x._replace(query_embeds=query)).scores[-1].sum().backward()
    assert (query.grad == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad, metric, device):
    x = make_documents(device=device)
    x = x._replace(query_embeds=x.query_embeds.requires_grad_(grad), table=x.table.requires_grad_(grad))
    # tests at the level of AOT dispatch need sizes that do not depend on data: the number of distinct ids stays inside
    torch.library.opcheck(torch.ops.qpeft_ext.similarity_topk, (*x, 4, metric))


def test_threads_do_not_matter():
    x = make_documents(Q=2, T=3, D=64, V=500, B=50, S=100)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(x)
        torch.set_num_threads(4)
        four = run(x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one.clue_ids, four.clue_ids) and torch.equal(one.query_positions, four.query_positions)
    torch.testing.assert_close(one.scores, four.scores, rtol=1e-6, atol=1e-6)


def with_value(x, at, value):
    x = x.clone()
    x[at] = value
    return x


@pytest.mark.parametrize(
    "change, error, words",
    [
        (
            lambda x: {"table": x.table[:, :4]},
            ValueError,
            r"query_embeds must have shape \[Q, T, D\] = \[any, any, 4\], got \[3, 5, 16\]",
        ),
        (lambda x: {"query_embeds": x.query_embeds[0]}, ValueError, "query_embeds must have shape"),
        (lambda x: {"document_mask": x.document_mask[:, 1:]}, ValueError, "document_mask must have shape"),
        (lambda x: {"query_mask": x.query_mask[:1]}, ValueError, "query_mask must have shape"),
        (lambda x: {"query_index": x.query_index[1:]}, ValueError, r"query_index must have shape \[B\] = \[7\]"),
        (lambda x: {"query_embeds": x.query_embeds.double()}, TypeError, "query_embeds must have the dtype of table"),
        (lambda x: {"table": x.table.long()}, TypeError, "table must be floating, got int64"),
        (lambda x: {"document_ids": x.document_ids.int()}, TypeError, "document_ids must be int64, got int32"),
        (lambda x: {"document_mask": x.document_mask.long()}, TypeError, "document_mask must be bool, got int64"),
        (lambda x: {"k": 0}, ValueError, "k must be at least 1, got 0"),
        (lambda x: {"metric": "euclid"}, ValueError, "metric must be one of"),
        (
            lambda x: {"query_mask": x.query_mask[:, :0], "query_embeds": x.query_embeds[:, :0]},
            ValueError,
            "every query needs a token, got T = 0",
        ),
    ],
)
def test_rejects(change, error, words, device):
    x = make_documents(device=device)
    with pytest.raises(error, match=f"similarity_topk: {words}"):
        similarity_topk(**{**x._asdict(), "k": 3, **change(x)})


def test_rejects_a_query_without_tokens():
    x = make_documents()
    with pytest.raises(ValueError, match="similarity_topk: every query needs a token, a row of query_mask is"):
        run(x._replace(query_mask=with_value(x.query_mask, 1, False)))


@pytest.mark.parametrize("id", [-1, 29, 2**40])
def test_rejects_ids_out_of_range(id):
    x = make_documents()
    words = rf"similarity_topk: document_ids\[6, 2\] = {id} is outside \[0, V\) = \[0, 29\)"
    with pytest.raises(IndexError, match=words):
        run(x._replace(document_ids=with_value(x.document_ids, (-1, 2), id)))
    with pytest.raises(IndexError, match=r"similarity_topk: query_index\[0\] = 3 is outside \[0, Q\) = \[0, 3\)"):
        run(x._replace(query_index=with_value(x.query_index, 0, 3)))


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_rejects_nan(metric):
    x = make_documents()
    for name, at in (("query_embeds", (2, 0, 0)), ("table", (int(x.document_ids[-1, 0]), 3))):
        with pytest.raises(ValueError, match="similarity_topk: a similarity is NaN"):
            run(x._replace(**{name: with_value(getattr(x, name), at, torch.nan)}), metric=metric)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("accumulate", [True, False])
def test_weighted_rows(device, weighted, accumulate):
    source, weights = torch.randn(9, 2500, device=device), torch.randn(7, device=device)
    rows, offsets = torch.tensor([8, 0, 3, 3, 1, -1, 99], device=device), torch.tensor([1, 1, 3, 5], device=device)
    before = torch.randn(3, 2500, device=device) if accumulate else torch.full((3, 2500), torch.nan, device=device)
    out = before.clone()  # -1 and 99 are in no segment
    torch.ops.qpeft_ext.weighted_rows(source, rows, weights if weighted else None, offsets, accumulate, out)
    factors = weights if weighted else torch.ones_like(weights)
    truth = torch.stack([factors[a:b] @ source[rows[a:b]] for a, b in ((1, 1), (1, 3), (3, 5))])
    torch.testing.assert_close(out, truth + before if accumulate else truth)


def test_direct_calls_are_memory_safe():
    ops = torch.ops.qpeft_ext
    x = make_documents()
    with pytest.raises(RuntimeError, match="document_rows_distinct: .* is outside"):
        ops.document_rows_distinct(x.document_ids + 29, x.document_mask, x.query_index, 3, 29)
    with pytest.raises(RuntimeError, match="document_rows_gather: rows"):
        ops.document_rows_gather(x.table, torch.tensor([29]), torch.empty(1, 16), None)
    with pytest.raises(RuntimeError, match="document_rows_gather: block must have size 1 in dimension 0"):
        ops.document_rows_gather(x.table, torch.tensor([2]), torch.empty(2, 16), None)
    one = torch.ones(1)
    for row, offsets in ((4, [0, 1]), (-1, [0, 1]), (0, [0, 2]), (0, [1, 0]), (0, [-1, 1])):
        with pytest.raises(RuntimeError, match="weighted_rows: (rows|offsets)"):
            rows, offsets = torch.tensor([row]), torch.tensor(offsets)
            ops.weighted_rows(torch.ones(4, 2), rows, one, offsets, False, torch.empty(1, 2))
    with pytest.raises(RuntimeError, match="out must have size 2 in dimension 1, got 3"):
        ops.weighted_rows(torch.ones(4, 2), torch.tensor([0]), None, torch.tensor([0, 1]), False, torch.empty(1, 3))
    best, positions = torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.int32)
    ids, slots = torch.tensor([[7, 8, 9]]), torch.tensor([[99, -5, 1]], dtype=torch.int32)
    _, clue_ids, *_ = ops.similarity_topk_select(best, positions, torch.tensor([0]), None, ids, slots, 2)
    assert clue_ids.tolist() == [[9, -1]]  # slots out of range are padding


@pytest.mark.skipif(not registered(), reason="the library is not loaded")
def test_select_takes_places_outside_of_best_for_padding():
    """What lies behind the numbers in memory is better than all of them."""
    best, positions = torch.tensor([1.0, 2.0, 99.0])[:2].view(1, 2), torch.zeros(1, 2, dtype=torch.int32)
    ids = torch.tensor([[5, 6, 7, 8]]).expand(3, 4)
    slots = torch.tensor([[0, 2, 1, -7]], dtype=torch.int32).expand(3, 4)
    rows = torch.tensor([0, 1, -1])
    scores, clue_ids, *_ = torch.ops.qpeft_ext.similarity_topk_select(best, positions, rows, None, ids, slots, 3)
    assert clue_ids.tolist() == [[7, 5, -1], [-1] * 3, [-1] * 3]
    assert scores.tolist() == [[2, 1, -torch.inf], [-torch.inf] * 3, [-torch.inf] * 3]
