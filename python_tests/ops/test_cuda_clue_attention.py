"""clue_attention on CUDA: each kernel against the CPU or float64, the operator with all of them against `reference`."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import poisoned, to_float64
from on_cuda import assert_close, check_in_a_graph, cpu, poisoned_memory
from test_clue_attention import assert_at_most_twice_torchs_error, gradients, make_inputs
from test_projected_table import attend, make_projected

import qpeft_ext.ops as ops
from qpeft_ext.ops import clue_attention_cuda as cuda
from qpeft_ext.ops.clue_attention import reference

pytestmark = pytest.mark.slow

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def sum_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_near(ours, truth, dtype):
    """Allow the rounding of a sum in ``dtype``, relative to the largest number."""
    if truth.numel() == 0:
        return
    error, size = (ours.double() - truth.double()).abs().max().item(), truth.double().abs().max().item()
    assert error <= 16 * torch.finfo(dtype).eps * max(size, 1e-3), f"{error:.1e} of {size:.1e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("P", "n", "R"), [(1, 1, 1), (3, 12, 1), (4, 37, 33), (3, 9, 64)])
def test_softmax(run, P, n, R, dtype):
    U, first = n + 3, 5
    slots = torch.stack([torch.randperm(U)[:n] for _ in range(P)]).int() + first
    slots[0, n // 2 :] = -1
    slots[-1, 0] = -1
    if P > 1:
        slots[1] = -1  # a document without tokens
    counts = torch.randint(1, 4, (P, n), dtype=torch.int32) * (slots >= 0)
    scores = 5 * torch.randn(U, R, dtype=sum_dtype(dtype))
    lse, weights = scores.new_full((P, R), torch.nan), scores.new_full((P, n, R), torch.nan)
    (ours,) = run("clue_attention_lse", scores, slots, counts, first, lse, outputs=(4,))
    cpu.clue_attention_lse(scores, slots, counts, first, lse)
    assert_close([ours], [lse], 1e-6)
    arguments = scores, slots, counts, lse, first
    (ours,) = run("clue_attention_weights", *arguments, weights.to(dtype), outputs=(5,))
    cpu.clue_attention_weights(*arguments, weights)
    assert_near(ours, weights, dtype)
    assert ((ours == 0) | (slots >= 0)[:, :, None]).all()
    grad_weights = torch.randn_like(weights).masked_fill((slots < 0)[:, :, None], torch.nan)  # not read at padding
    (ours,) = run("clue_attention_softmax_backward", weights.to(dtype), slots, grad_weights, outputs=(2,))
    cpu.clue_attention_softmax_backward(weights.to(dtype).to(weights.dtype), slots, grad_weights)
    assert_close([ours], [grad_weights])


def lists(L, most, end_to_end, V=50, seed=0):
    """Make lists of 0 (the first) to ``most`` (the last) rows: rows, offsets or lengths, and the place of each row."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.arange(L) * most // max(L - 1, 1) if L > 1 else torch.tensor([most])
    lengths[1:-1] = torch.randint(0, most + 1, (max(L - 2, 0),), generator=random)
    starts = lengths.cumsum(0) - lengths if end_to_end else torch.arange(L) * most
    places = [start + torch.arange(length) for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)]
    rows = torch.full((int(lengths.sum()) + 7 if end_to_end else L * most,), 2**40)  # what lies in no list is not read
    for place in places:
        rows[place] = torch.randint(0, V, (len(place),), generator=random)
    offsets = torch.cat([starts, lengths[-1:] + starts[-1:]]) if end_to_end else None
    return rows, offsets, None if end_to_end else lengths, places


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("end_to_end", "L", "most", "R", "D"), [(True, 3, 40, 20, 72), (False, 4, 9, 3, 33)])
def test_products(run, end_to_end, L, most, R, D, dtype):
    rows, offsets, lengths, places = lists(L, most, end_to_end)
    table, dense = torch.randn(50, D).to(dtype), torch.randn(L, R, D).to(dtype)
    products = torch.full((len(rows), R), torch.nan, dtype=sum_dtype(dtype))
    (ours,) = run("clue_attention_products", table, rows, offsets, lengths, dense, products, outputs=(5,))
    for i, place in enumerate(places):
        assert_near(ours[place], table[rows[place]].double() @ dense[i].double().T, products.dtype)
    rest = torch.ones(len(rows), dtype=torch.bool).index_fill(0, torch.cat(places), False)
    assert ours[rest].isnan().all()


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("end_to_end", "L", "most", "R", "D", "heads"),
    [
        (False, 1, 1, 1, 1, 1),
        (False, 3, 150, 8, 136, 1),  # one stage after the other; a second tile of numbers with 8 of them
        (True, 4, 33, 136, 24, 1),  # a second tile of columns
        (False, 3, 40, 5, 66, 1),  # nothing is aligned
        (False, 2, 20, 8, 64, 4),
        (True, 3, 9, 3, 30, 3),
    ],
)
def test_weighted_sums(run, end_to_end, L, most, R, D, heads, dtype, accumulate):
    rows, offsets, lengths, places = lists(L, most, end_to_end)
    table = torch.randn(50, D).to(dtype)
    weights = torch.full((len(rows), heads * R), torch.nan).to(dtype)
    weights[torch.cat(places)] = torch.randn(sum(map(len, places)), heads * R).to(dtype)
    out_dtype = sum_dtype(dtype) if accumulate else dtype
    sums = torch.randn(L, R, D).to(out_dtype) if accumulate else torch.full((L, R, D), torch.nan, dtype=dtype)
    arguments = table, rows, offsets, lengths, weights, heads, accumulate, sums
    (ours,) = run("clue_attention_weighted_sums", *arguments, outputs=(7,))
    truth = sums.double() if accumulate else torch.zeros(L, R, D).double()
    for i, place in enumerate(places):
        w, x = weights[place].double().view(-1, heads, R), table[rows[place]].double().view(-1, heads, D // heads)
        truth[i] += torch.einsum("nhr,nhd->rhd", w, x).reshape(R, D)
    assert_near(ours, truth, out_dtype)


def test_wrong_rows_trap(replica):
    one, table = torch.ones(1, 1), torch.randn(3, 1)
    for wrong in (-1, 3):
        rows, length = torch.tensor([wrong]), torch.tensor([1])
        with pytest.raises(RuntimeError, match="clue_attention_products: .*trap"):
            replica.clue_attention_products(table, rows, None, length, one[None], one.clone())
        with pytest.raises(RuntimeError, match="clue_attention_weighted_sums: .*trap"):
            replica.clue_attention_weighted_sums(table, rows, None, length, one, 1, False, one[None].clone())
    for lists in ((None, length + 1), (torch.tensor([0, 2]), None), (torch.tensor([-1, 1]), None)):
        with pytest.raises(RuntimeError, match="clue_attention_weighted_sums: .*trap"):
            replica.clue_attention_weighted_sums(table, rows * 0, *lists, one, 1, False, one[None].clone())
        around = torch.zeros(3, dtype=torch.int64)  # rows that would do lie before and behind
        with pytest.raises(RuntimeError, match="clue_attention_products: .*trap"):
            replica.clue_attention_products(table, around[1:2], *lists, one[None], torch.zeros(3, 1)[1:2])


# ---- the operator: its Python for CUDA with the CUDA kernels underneath ----------------------------------------------


class _Heads(torch.autograd.Function):
    """`clue_attention_heads` with the Python that CUDA tensors take."""

    @staticmethod
    def forward(ctx, *inputs):
        heads, lse = cuda.forward(*inputs)
        ctx.save_for_backward(lse, *inputs)
        ctx.mark_non_differentiable(lse)
        return heads, lse

    @staticmethod
    def backward(ctx, grad_heads, _):
        want_table = ctx.needs_input_grad[1]
        grad_absorbed, grad_w_v, grad_table = cuda.backward(grad_heads, *ctx.saved_tensors, want_table)
        return grad_absorbed, grad_table if want_table else None, None, None, None, grad_w_v


@pytest.fixture
def on_cuda_kernels(replica, monkeypatch):
    """CPU tensors go the way of CUDA tensors, with poisoned memory."""
    primitives = ("lse", "weights", "softmax_backward", "products", "weighted_sums")
    for name in ("document_rows_distinct", "weighted_rows", *(f"clue_attention_{name}" for name in primitives)):
        monkeypatch.setattr(cpu, name, getattr(replica, name))
    monkeypatch.setattr(cpu, "clue_attention_heads", _Heads.apply)
    with poisoned_memory():
        yield monkeypatch


def check_against_definition(x, weights, H, tolerance=1e-5, table=True):
    """Compare result and gradients of the operator in float32 or float64 with float64."""
    results = []
    for function, change in ((ops.clue_attention, lambda y: y), (reference, torch.Tensor.double)):
        leaves = [change(y).clone().requires_grad_() for y in (x.query_embeds, x.table, *weights)]
        documents = x._replace(query_embeds=leaves[0], table=leaves[1] if table else leaves[1].detach())
        result = function(*documents, *leaves[2:], num_heads=H)
        scale = torch.linspace(-1, 1, result.numel(), dtype=torch.float64).view_as(result)
        wanted = leaves if table else [leaves[0], *leaves[2:]]
        results.append([result, *torch.autograd.grad((result * scale).sum(), wanted)])
    for ours, truth in zip(*results, strict=True):
        assert ours.isfinite().all()
        assert (ours.double() - truth).norm() <= tolerance * (truth.norm() + 1)  # which may be 0


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "H"),
    [({}, 4), ({"Q": 2, "T": 9, "D": 33, "V": 7, "B": 9, "S": 150}, 3), ({"B": 0}, 4), ({"S": 0}, 2), ({"D": 0}, 1)],
    ids=str,
)
def test_operator(on_cuda_kernels, shape, H, dtype, table):
    x, weights = make_inputs(H=H, dtype=dtype, **shape)
    check_against_definition(poisoned(x)._replace(query_embeds=x.query_embeds), weights, H, table=table)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_operator_in_half_precision(on_cuda_kernels, dtype):
    def product(a, b):  # the CPU has no GEMM of halves with float32 results
        return a.float() @ b.float()

    on_cuda_kernels.setattr(cuda, "multiply", product)
    on_cuda_kernels.setattr(cuda, "add_product", lambda total, a, b: total.add_(product(a, b)))
    x, weights = make_inputs(dtype=dtype, D=64, B=20, Q=6)
    theirs = gradients(x, weights, reference)
    truth = gradients(x._make(to_float64(x)), to_float64(weights), reference)
    result, ours = gradients(x, weights)
    assert_at_most_twice_torchs_error(result, theirs[0], truth[0])
    for a, b, c in zip(ours, theirs[1], truth[1], strict=True):
        assert_at_most_twice_torchs_error(a, b, c)


def test_operator_in_small_blocks(on_cuda_kernels):
    x, weights = make_inputs(B=11)
    pair = 23 * 20 * 16  # bytes: S, R, two scores and two weights
    on_cuda_kernels.setattr(cuda, "CONTEXT_BYTES", 2 * 20 * 16 * 4)  # 2 pairs
    on_cuda_kernels.setattr(cuda, "SCORE_BYTES", 5 * pair)
    on_cuda_kernels.setattr(cuda, "ROW_BYTES", 2 * 3 * 16 * 4)  # 3 places
    check_against_definition(x, weights, 4)
    on_cuda_kernels.setattr(cuda, "SCORE_BYTES", pair // 2)  # not even a pair: some tokens of the query at a time
    check_against_definition(x, weights, 4)


@given(
    Q=st.integers(1, 4), T=st.integers(1, 9), H=st.integers(1, 3), d=st.integers(1, 12), V=st.integers(1, 40),
    B=st.integers(1, 9), S=st.integers(1, 40), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_operator_on_any_shape(on_cuda_kernels, Q, T, H, d, V, B, S, seed):
    x, weights = make_inputs(H=H, Q=Q, T=T, D=H * d, V=V, B=B, S=S, seed=seed)
    check_against_definition(x, weights, H, tolerance=1e-4)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_projected_table(on_cuda_kernels, dtype, tolerance):
    x, weights = make_inputs(dtype=dtype)
    x = poisoned(x)
    projected = make_projected(x, weights)
    projected.all_at_once, projected.dtype = True, dtype
    projected.keys, projected.values = projected.keys.to(dtype), projected.values.to(dtype)
    truth = reference(
        *to_float64(x._replace(query_embeds=x.query_embeds.nan_to_num())), *to_float64(weights), num_heads=4
    )
    for _ in range(2):  # with a pair at a time, and then some tokens of a query
        torch.testing.assert_close(attend(projected, x, weights).double(), truth, rtol=tolerance, atol=tolerance)
        assert projected.used_bytes == projected.row_bytes * len(x.table)
        on_cuda_kernels.setattr(cuda, "SCORE_BYTES", 23 * 20 * 4)


def test_operator_does_not_depend_on_the_order_of_threads(on_cuda_kernels):
    x, weights = make_inputs(B=9)
    results = []
    for order in ("forward", "backward"):
        on_cuda_kernels.setenv("QPEFT_REPLICA_ORDER", order)
        results.append(gradients(x, weights))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_in_a_graph(dtype):
    def step(*tensors):
        result, grads = gradients(type(x)(*tensors[: len(x)]), tensors[len(x) :])
        return result, *grads

    (x, weights), (other, other_weights) = (make_inputs(dtype=dtype, seed=seed) for seed in (0, 3))
    check_in_a_graph(step, (*x, *weights), (*other, *other_weights))
