import pytest
import torch
from inputs import make_documents, poisoned, to_float64

from qpeft_ext.ops import attention_weights, clue_attention
from qpeft_ext.ops.clue_attention import reference

SHAPES = [
    ({}, 4),
    ({"Q": 1, "T": 1, "D": 1, "V": 1, "B": 1, "S": 1}, 1),
    ({"Q": 2, "T": 17, "D": 33, "V": 7, "B": 9, "S": 300}, 3),  # ids repeat many times
    ({"Q": 9, "T": 3, "D": 66, "V": 3000, "B": 12, "S": 70, "seed": 1}, 2),
    ({"B": 0}, 4),
    ({"S": 0}, 4),
]


def make_inputs(H=4, dtype=torch.float32, device="cpu", biases=True, **shape):
    """Make documents, then weights and biases."""
    x = make_documents(dtype=dtype, device=device, **shape)
    random = torch.Generator().manual_seed(7)
    D = x.table.shape[1]
    weights = [torch.randn(D, D, generator=random, dtype=torch.float64) / D**0.5 for _ in range(4)]
    biases = [torch.randn(D, generator=random, dtype=torch.float64) if biases else None for _ in range(4)]
    return x, [None if w is None else w.to(dtype).to(device) for w in weights + biases]


def assert_at_most_twice_torchs_error(ours, theirs, truth):
    """Check results that are rounded to the dtype of the inputs: torch rounds them too, perhaps differently."""
    if truth.numel() == 0:
        return
    floor = 1e-6 * truth.abs().max().clamp_min(1)
    error, allowed = ((y.double() - truth).square().mean().sqrt() for y in (ours, theirs))
    assert error <= 2 * allowed + floor, f"error {error:.2e}, torch's own {allowed:.2e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape, H", SHAPES, ids=str)
def test_matches_reference(shape, H, dtype, device):
    x, weights = make_inputs(H=H, dtype=dtype, device=device, **shape)
    result = clue_attention(*x, *weights, num_heads=H)
    truth = reference(*to_float64(x), *to_float64(weights), num_heads=H)
    assert result.shape == truth.shape and result.dtype == dtype
    if dtype == torch.bfloat16:
        assert_at_most_twice_torchs_error(result, reference(*x, *weights, num_heads=H), truth)
    else:
        torch.testing.assert_close(result.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_matches_reference_in_several_blocks(dtype, device, small_blocks):
    """The pairs fall into several blocks, these into parts, and the rows into blocks."""
    test_matches_reference({"Q": 1, "T": 33, "D": 48, "V": 300, "B": 5, "S": 260}, 16, dtype, device)


@pytest.mark.parametrize("biases", [True, False])
def test_equals_multihead_attention(biases, device):
    x, weights = make_inputs(device=device, biases=biases)
    module = torch.nn.MultiheadAttention(16, 4, bias=biases, batch_first=True, device=device)
    with torch.no_grad():
        module.in_proj_weight.copy_(torch.cat(weights[:3]))
        module.out_proj.weight.copy_(weights[3])
        if biases:
            module.in_proj_bias.copy_(torch.cat(weights[4:7]))
            module.out_proj.bias.copy_(weights[7])
    result = clue_attention(*x, *weights, num_heads=4)
    ours = attention_weights(*x, *weights[:2], *weights[4:6], num_heads=4)
    keys = x.table[x.document_ids]
    arguments = {"key_padding_mask": ~x.document_mask, "average_attn_weights": False}
    theirs, their_weights = module(x.query_embeds[x.query_index], keys, keys, **arguments)
    counts = x.query_mask[x.query_index] & x.document_mask.any(1, keepdim=True)
    torch.testing.assert_close(result[counts], theirs[counts], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.transpose(1, 2)[counts], their_weights.transpose(1, 2)[counts])


def test_attention_weights_sum_to_one_over_what_is_there(device):
    x, weights = make_inputs(device=device)
    w = attention_weights(*poisoned(x), *weights[:2], *weights[4:6], num_heads=4)
    assert w.shape == (7, 4, 5, 23)
    assert (w.masked_select(~x.document_mask[:, None, None, :]) == 0).all()
    sums = x.document_mask.any(1).to(w.dtype)[:, None, None].expand(7, 4, 5)
    torch.testing.assert_close(w.sum(-1), sums)


def test_masked_rows_are_zero(device):
    x, weights = make_inputs(device=device)
    result = clue_attention(*x, *weights, num_heads=4)
    counts = x.query_mask[x.query_index] & x.document_mask.any(1, keepdim=True)
    assert not x.document_mask[0].any() and (result[~counts] == 0).all() and (result[counts] != 0).any(-1).all()


def test_large_scores_do_not_overflow(device):
    x, weights = make_inputs(device=device, dtype=torch.float64, B=4, S=9, V=200)
    x = x._replace(query_embeds=x.query_embeds * 1000)  # one token takes all; each place is the winner somewhere
    truth = reference(*x, *weights, num_heads=4)
    single = [y.float() if y.is_floating_point() else y for y in (*x, *weights)]
    result = clue_attention(*single, num_heads=4)
    torch.testing.assert_close(result.double(), truth, rtol=1e-3, atol=1e-3)


def gradients(x, weights, function=clue_attention):
    inputs = [y.clone().requires_grad_() for y in (x.query_embeds, x.table, *weights)]
    x = x._replace(query_embeds=inputs[0], table=inputs[1])
    result = function(*x, *inputs[2:], num_heads=4)
    scale = torch.linspace(-1, 1, result.numel(), device=result.device, dtype=torch.float64).view_as(result)
    return result, torch.autograd.grad((result * scale).sum(), inputs)


def test_masked_tokens_do_not_matter(device):
    x, weights = make_inputs(device=device)
    for clean, noisy in zip(gradients(x, weights), gradients(poisoned(x), weights), strict=True):
        torch.testing.assert_close(noisy, clean, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_matches_reference(dtype, device):
    x, weights = make_inputs(dtype=dtype, device=device, D=64, B=20, Q=6)
    _, ours = gradients(x, weights)
    _, theirs = gradients(x, weights, reference)
    truth = gradients(x._make(to_float64(x)), to_float64(weights), reference)[1]
    for i, (a, b, c) in enumerate(zip(ours, theirs, truth, strict=True)):
        if i == 7:  # b_k
            assert (a == 0).all()
        elif dtype == torch.bfloat16:
            assert_at_most_twice_torchs_error(a, b, c)
        else:
            torch.testing.assert_close(a.double(), c, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("table", [False, True])
def test_gradcheck(table, device):
    x, weights = make_inputs(H=2, Q=2, T=3, D=4, V=5, B=4, S=6, dtype=torch.float64, device=device)
    inputs = [y.requires_grad_() for y in (x.query_embeds, *weights)]
    x.table.requires_grad_(table)

    def function(query_embeds, table, *weights):
        return clue_attention(*x._replace(query_embeds=query_embeds, table=table), *weights, num_heads=2)

    assert torch.autograd.gradcheck(function, (inputs[0], x.table, *inputs[1:]))


def test_masked_query_tokens_get_no_gradient(device):
    x, weights = make_inputs(device=device)
    _, (grad_query, *_) = gradients(x, weights)
    assert (grad_query[~x.query_mask] == 0).all() and (grad_query[x.query_mask] != 0).any()


def test_small_blocks_change_nothing(device, monkeypatch):
    from qpeft_ext.ops import _common, _pairs

    x, weights = make_inputs(device=device, B=20)
    whole, whole_gradients = gradients(x, weights)
    monkeypatch.setattr(_pairs, "CONTEXT_BYTES", 3 * 5 * 4 * 16 * 4)  # 3 pairs
    monkeypatch.setattr(_pairs, "GATHER_BYTES", 30 * 16 * 4)
    monkeypatch.setattr(_common, "BLOCK_BYTES", 7 * 16 * 4)
    small, small_gradients = gradients(x, weights)
    torch.testing.assert_close(small, whole)
    torch.testing.assert_close(small_gradients, whole_gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad, device):
    x, weights = make_inputs(device=device)
    x = x._replace(query_embeds=x.query_embeds.requires_grad_(grad), table=x.table.requires_grad_(grad))
    torch.library.opcheck(torch.ops.qpeft_ext.clue_attention, (*x, *(w.requires_grad_(grad) for w in weights), 4))
    absorbed = torch.randn(3, 5, 4, 16, device=device, requires_grad=grad)
    documents = (x.table, x.document_ids, x.document_mask, x.query_index)
    torch.library.opcheck(torch.ops.qpeft_ext.clue_attention_heads, (absorbed, *documents, weights[2].detach()))


@pytest.mark.parametrize(
    "change, error, words",
    [
        (lambda x: {"num_heads": 3}, ValueError, "num_heads must divide D = 16, got 3"),
        (lambda x: {"num_heads": 0}, ValueError, "num_heads must divide D = 16, got 0"),
        (lambda x: {"w_v": x["w_v"][:8]}, ValueError, r"w_v must have shape \[D, D\] = \[16, 16\], got \[8, 16\]"),
        (lambda x: {"b_o": x["b_o"][:8]}, ValueError, r"b_o must have shape \[D\] = \[16\], got \[8\]"),
        (lambda x: {"w_k": x["w_k"].double()}, TypeError, "w_k must have the dtype of table, float32, got float64"),
        (lambda x: {"document_ids": x["document_ids"][0]}, ValueError, "document_ids must have shape"),
        (lambda x: {"query_mask": x["query_mask"].long()}, TypeError, "query_mask must be bool, got int64"),
    ],
)
def test_rejects(change, error, words, device):
    x, weights = make_inputs(device=device)
    names = ("w_q", "w_k", "w_v", "w_o", "b_q", "b_k", "b_v", "b_o")
    inputs = {**x._asdict(), **dict(zip(names, weights, strict=True)), "num_heads": 4}
    with pytest.raises(error, match=f"clue_attention: {words}"):
        clue_attention(**{**inputs, **change(inputs)})


@pytest.mark.parametrize("id", [-1, 29, 2**40])
def test_rejects_ids_out_of_range(id):
    x, weights = make_inputs()
    x.document_ids[-1, 2] = id
    with pytest.raises(IndexError, match=rf"clue_attention: document_ids\[6, 2\] = {id} is outside \[0, V\)"):
        clue_attention(*x, *weights, num_heads=4)


def test_direct_calls_are_memory_safe():
    ops = torch.ops.qpeft_ext
    slots = torch.tensor([[0, 3, -1, 99]], dtype=torch.int32)
    scores, lse, weights = torch.zeros(4, 2), torch.empty(1, 2), torch.empty(1, 4, 2)
    ops.clue_attention_lse(scores, slots, torch.ones_like(slots), 0, lse)
    ops.clue_attention_weights(scores, slots, torch.ones_like(slots), lse, 0, weights)
    torch.testing.assert_close(weights[0, :, 0], torch.tensor([0.5, 0.5, 0, 0]))  # slots out of range are padding
    with pytest.raises(RuntimeError, match="counts must have size 4 in dimension 1, got 3"):
        ops.clue_attention_lse(scores, slots, torch.ones(1, 3, dtype=torch.int32), 0, lse)
    with pytest.raises(RuntimeError, match="weights must have size 4 in dimension 1, got 3"):
        ops.clue_attention_softmax_backward(weights[:, :3].contiguous(), slots, weights)
