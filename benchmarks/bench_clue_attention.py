"""clue_attention against torch.nn.MultiheadAttention and its own algorithm in plain PyTorch; and ProjectedTable."""

from __future__ import annotations

import pytest
import torch
from common import Case, Documents, distinct_bytes, main, make_documents, run_tiny
from torch import Tensor
from torch.nn.functional import linear

from qpeft_ext.ops import ProjectedTable, clue_attention

HEADS = 8
PAIRS_PER_BLOCK = 16  # of same_algorithm_torch: 32 MB of contexts, as ours has


def make_module(D: int, x: Documents) -> torch.nn.MultiheadAttention:
    torch.manual_seed(0)
    return torch.nn.MultiheadAttention(D, HEADS, batch_first=True, device=x.table.device, dtype=x.table.dtype)


def weights_of(module: torch.nn.MultiheadAttention) -> tuple[list[Tensor], list[Tensor]]:
    weights = [*module.in_proj_weight.chunk(3), module.out_proj.weight]
    biases = [*module.in_proj_bias.chunk(3), module.out_proj.bias]
    return [y.detach().clone().requires_grad_() for y in weights], [y.detach().clone().requires_grad_() for y in biases]


def textbook(module, x: Documents) -> Tensor:
    keys = x.table[x.document_ids]
    return module(x.query_embeds[x.query_index], keys, keys, key_padding_mask=~x.document_mask, need_weights=False)[0]


def same_algorithm_torch(x: Documents, w_q, w_k, w_v, w_o, b_q, b_k, b_v, b_o) -> Tensor:
    """W_k absorbed into the query, W_v behind the sum, scores once per distinct id, blocks of pairs."""
    (Q, T, D), d = x.query_embeds.shape, x.query_embeds.shape[2] // HEADS
    queries = linear(x.query_embeds, w_q, b_q).view(Q * T, HEADS, d).transpose(0, 1) * d**-0.5
    absorbed = torch.bmm(queries, w_k.view(HEADS, d, D)).transpose(0, 1).reshape(Q, T * HEADS, D)
    heads = []
    for query in range(Q):
        pairs = (x.query_index == query).nonzero()[:, 0]
        distinct, inverse = x.document_ids[pairs].where(x.document_mask[pairs], 0).unique(return_inverse=True)
        of_ids = torch.cat([x.table[block] @ absorbed[query].T for block in distinct.split(256)])  # [U, T * H]
        for block, slots in zip(pairs.split(PAIRS_PER_BLOCK), inverse.split(PAIRS_PER_BLOCK), strict=True):
            scores = of_ids[slots].masked_fill(~x.document_mask[block][:, :, None], -torch.inf)  # [P, S, T * H]
            rows = x.table[x.document_ids[block].where(x.document_mask[block], 0)]  # [P, S, D]
            context = (scores.softmax(1).mT @ rows).view(-1, HEADS, D)  # [P * T, H, D]
            per_head = torch.bmm(context.transpose(0, 1), w_v.view(HEADS, d, D).mT)  # [H, P * T, D / H]
            heads.append(per_head.transpose(0, 1).reshape(-1, T, D))
    return linear(torch.cat(heads) + b_v, w_o, b_o)


def projected_torch(x: Documents, keys: Tensor, values: Tensor, w_q, w_o, b_q, b_v, b_o) -> Tensor:
    """ProjectedTable's algorithm in plain PyTorch: keys and values of all rows are there already."""
    Q, T, D = x.query_embeds.shape
    queries = linear(x.query_embeds, w_q, b_q).view(Q, T, HEADS, D // HEADS).transpose(1, 2)[x.query_index]
    heads = []
    for block in torch.arange(len(x.query_index), device=x.table.device).split(PAIRS_PER_BLOCK):
        ids = x.document_ids[block].where(x.document_mask[block], 0)
        k, v = (y[ids].unflatten(-1, (HEADS, D // HEADS)).transpose(1, 2) for y in (keys, values))
        mask = x.document_mask[block][:, None, None]
        mixed = torch.nn.functional.scaled_dot_product_attention(queries[block], k, v, attn_mask=mask)
        heads.append(mixed.transpose(1, 2).flatten(2))
    return linear(torch.cat(heads) + b_v, w_o, b_o)


def relative(ours: Tensor, theirs: Tensor) -> float:
    difference = ((ours - theirs).float().norm() / theirs.float().norm()).item()
    assert difference < (1e-4 if ours.dtype == torch.float32 else 3e-2), f"results differ by {difference}"
    return difference


def gradient_error(ours, theirs) -> float:
    return max(relative(a, b) for a, b in zip(ours, theirs, strict=True))


def flops(x: Documents, steps: int) -> float:
    """Of the absorbed algorithm with distinct ids: outputs 2 T D^2 a pair, contexts T H n D, scores T H U D a query.
    A backward pass does the outputs twice and contexts, their gradient and the scores again.
    """
    (Q, T, D), B = x.query_embeds.shape, len(x.query_index)
    ids = [x.document_ids[b][x.document_mask[b]].unique() for b in range(B)]
    contexts = sum(len(i) for i in ids) * T * HEADS * D
    scores = sum(
        len(torch.cat([i for b, i in enumerate(ids) if x.query_index[b] == q]).unique()) for q in range(Q)
    ) * T * HEADS * D
    outputs = 2 * B * T * D * D
    forward = outputs + contexts + scores
    return 2 * (forward if steps == 1 else 3 * outputs + 3 * contexts + 3 * scores)


def forward(Q, each, **shape):
    def case(device):
        x = make_documents(Q, each, device, **shape)
        module = make_module(x.table.shape[1], x)
        weights = [y.detach() for group in weights_of(module) for y in group]

        def no_grad(function):
            def run():
                with torch.no_grad():
                    return function()

            return run

        baselines = {
            "textbook": no_grad(lambda: textbook(module, x)),
            "same_algorithm_torch": no_grad(lambda: same_algorithm_torch(x, *weights)),
        }
        ours = no_grad(lambda: clue_attention(*x, *weights, num_heads=HEADS))
        return Case(ours, baselines, relative, distinct_bytes(x), flops(x, 1))

    return case


def backward(Q, each, **shape):
    """Forward and backward to the weights and biases, as in training."""

    def case(device):
        x = make_documents(Q, each, device, **shape)
        module = make_module(x.table.shape[1], x)
        weights, biases = weights_of(module)
        gradient = torch.randn(len(x.query_index), *x.query_embeds.shape[1:], device=device, dtype=x.table.dtype)

        def step(function):
            grads = torch.autograd.grad(function(), weights + biases[:1] + biases[2:], gradient)
            return grads

        def step_textbook():
            wanted = (module.in_proj_weight, module.out_proj.weight, module.in_proj_bias, module.out_proj.bias)
            w_in, w_o, b_in, b_o = torch.autograd.grad(textbook(module, x), wanted, gradient)
            b_q, _, b_v = b_in.chunk(3)
            return *w_in.chunk(3), w_o, b_q, b_v, b_o

        baselines = {
            "textbook": step_textbook,
            "same_algorithm_torch": lambda: step(lambda: same_algorithm_torch(x, *weights, *biases)),
        }
        ours = lambda: step(lambda: clue_attention(*x, *weights, *biases, num_heads=HEADS))  # noqa: E731
        return Case(ours, baselines, gradient_error, distinct_bytes(x), flops(x, 2))

    return case


def projected(Q, each, **shape):
    """Inference with fixed weights, all rows projected before."""

    def case(device):
        x = make_documents(Q, each, device, **shape)
        module = make_module(x.table.shape[1], x)
        w_q, w_k, w_v, w_o, b_q, b_k, b_v, b_o = (y.detach() for group in weights_of(module) for y in group)
        table = ProjectedTable(x.table, w_k, w_v, b_k, b_v, budget_bytes=4 << 30)
        documents = (x.query_embeds, x.query_mask, x.document_ids, x.document_mask, x.query_index)
        keys, values = torch.zeros_like(x.table), torch.zeros_like(x.table)
        distinct = x.document_ids[x.document_mask].unique()
        keys[distinct], values[distinct] = x.table[distinct] @ w_k.T, x.table[distinct] @ w_v.T
        keys += b_k

        def ours():
            return table.attend(*documents, w_q, w_o, b_q, b_o, num_heads=HEADS)

        def absorbed():
            with torch.no_grad():
                return clue_attention(*x, w_q, w_k, w_v, w_o, b_q, b_k, b_v, b_o, num_heads=HEADS)

        baselines = {
            "same_algorithm_torch": lambda: projected_torch(x, keys, values, w_q, w_o, b_q, b_v, b_o),
            "clue_attention": absorbed,
        }
        work = 2 * len(x.query_index) * x.query_embeds.shape[1] * x.table.shape[1] ** 2
        return Case(ours, baselines, relative, 2 * distinct_bytes(x), work)

    return case


WORKS = {
    "tiny": backward(2, 5, T=3, S=40, D=64, V=500),
    "clue_attention/1x100": forward(1, 100),
    "clue_attention/4x8": forward(4, 8, shared=True),
    "clue_attention/32x100": forward(32, 100),
    "clue_attention/1x100/backward": backward(1, 100),
    "clue_attention/4x8/backward": backward(4, 8, shared=True),
    "clue_attention/1x100/projected": projected(1, 100),
}
CUDA = tuple(w for w in WORKS if w != "tiny")
DEFAULT = {"cpu": tuple(w for w in CUDA if "32x" not in w), "cuda": CUDA}


@pytest.mark.parametrize("function", ["ours", "textbook", "same_algorithm_torch"])
def test_tiny(benchmark, function):
    run_tiny(benchmark, WORKS, function)


if __name__ == "__main__":
    main("clue_attention", WORKS, DEFAULT)
