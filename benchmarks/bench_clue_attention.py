"""clue_attention against torch.nn.MultiheadAttention and its own algorithm in plain PyTorch; and ProjectedTable."""

from __future__ import annotations

import pytest
import torch
from common import (
    FIRST,
    MODELS,
    Case,
    Documents,
    compiled,
    distinct_bytes,
    main,
    make_documents,
    pairs_of_rows,
    run_tiny,
    works,
)
from timing import normal
from torch import Tensor
from torch.nn.functional import linear

from qpeft_ext.ops import ProjectedTable, clue_attention

HEADS = 8
PAIRS_PER_BLOCK = 16  # of same_algorithm_by_queries: 32 MB of contexts, as ours has


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


def absorb(x: Documents, w_q, w_k, b_q) -> Tensor:
    (Q, T, D), d = x.query_embeds.shape, x.query_embeds.shape[2] // HEADS
    queries = linear(x.query_embeds, w_q, b_q).view(Q * T, HEADS, d).transpose(0, 1) * d**-0.5
    return torch.bmm(queries, w_k.view(HEADS, d, D)).transpose(0, 1).reshape(Q, T * HEADS, D)


def values_of(context: Tensor, w_v: Tensor, T: int) -> Tensor:
    """Multiply contexts [P, T * H, D] with W_v of each head; return the heads side by side, [P, T, D]."""
    D, d = context.shape[2], context.shape[2] // HEADS
    per_head = torch.bmm(context.view(-1, HEADS, D).transpose(0, 1), w_v.view(HEADS, d, D).mT)  # [H, P * T, d]
    return per_head.transpose(0, 1).reshape(-1, T, D)


def same_algorithm_torch(x: Documents, *weights) -> Tensor:
    """Absorb W_k into the query and apply W_v after the sum, in blocks of pairs; nothing of all pairs is stored."""
    on_gpu = x.table.device.type == "cuda"
    return (same_algorithm_by_pairs if on_gpu else same_algorithm_by_queries)(x, *weights)


def same_algorithm_by_queries(x: Documents, w_q, w_k, w_v, w_o, b_q, b_k, b_v, b_o) -> Tensor:
    """Compute scores once per distinct id of a query: the fewest operations, which matters most on a CPU."""
    absorbed, T, heads = absorb(x, w_q, w_k, b_q), x.query_embeds.shape[1], []
    for query in range(x.query_embeds.shape[0]):
        pairs = (x.query_index == query).nonzero()[:, 0]
        distinct, inverse = x.document_ids[pairs].where(x.document_mask[pairs], 0).unique(return_inverse=True)
        of_ids = torch.cat([x.table[block] @ absorbed[query].T for block in distinct.split(256)])  # [U, T * H]
        for block, slots in zip(pairs.split(PAIRS_PER_BLOCK), inverse.split(PAIRS_PER_BLOCK), strict=True):
            scores = of_ids[slots].masked_fill(~x.document_mask[block][:, :, None], -torch.inf)  # [P, S, T * H]
            rows = x.table[x.document_ids[block].where(x.document_mask[block], 0)]  # [P, S, D]
            heads.append(values_of(scores.softmax(1).mT @ rows, w_v, T))
    return linear(torch.cat(heads) + b_v, w_o, b_o)


def same_algorithm_by_pairs(x: Documents, w_q, w_k, w_v, w_o, b_q, b_k, b_v, b_o) -> Tensor:
    """Gather rows once for scores and contexts, 128 MB at a time, with batched GEMMs and no wait for the GPU."""
    absorbed, (_, T, D), heads = absorb(x, w_q, w_k, b_q), x.query_embeds.shape, []
    ids = x.document_ids.where(x.document_mask, 0)
    size = max(1, (128 << 20) // (ids.shape[1] * D * x.table.element_size()))
    blocks = zip(ids.split(size), x.document_mask.split(size), x.query_index.split(size), strict=True)
    for some, mask, query in blocks:
        rows = x.table[some]  # [P, S, D]
        scores = torch.bmm(absorbed[query], rows.mT).float()  # [P, T * H, S]
        weights = scores.masked_fill_(~mask[:, None], -torch.inf).softmax(-1).to(rows.dtype)
        heads.append(values_of(torch.bmm(weights, rows), w_v, T))
    return linear(torch.cat(heads) + b_v, w_o, b_o)


def projected_torch(x: Documents, keys: Tensor, values: Tensor, w_q, w_o, b_q, b_v, b_o) -> Tensor:
    """Compute as ProjectedTable does, in plain PyTorch, with keys and values of all rows projected before."""
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
    """Count the FLOPs of the absorbed algorithm with distinct ids.

    In multiply-adds: outputs 2 T D^2 and contexts T H n D for each pair, scores T H U D for each query.
    A backward pass does the outputs twice and contexts, their gradient and the scores again.
    """
    (_, T, D), B = x.query_embeds.shape, len(x.query_index)
    documents = torch.arange(B, device=x.table.device)[:, None] * x.table.shape[0] + x.document_ids
    contexts = documents[x.document_mask].unique().numel() * T * HEADS * D
    scores = pairs_of_rows(x) * T * HEADS * D
    return 2 * steps * (2 * B * T * D * D + contexts + scores)


def make(queries, each, shared, D, V, backward, **lengths):
    """Make the case; the backward pass goes to weights and biases, as in training."""

    def case(device):
        sets = make_documents(queries, each, shared, D, V, device, **lengths)
        x = sets[0]
        module = make_module(D, x)
        weights, biases = weights_of(module)
        wanted = weights + biases[:1] + biases[2:]
        gradient = normal(device, len(x.query_index), *x.query_embeds.shape[1:], seed=9)

        def no_grad(function):
            def run(x):
                with torch.no_grad():
                    return function(x)

            return run

        def step(function):
            return lambda x: torch.autograd.grad(function(x), wanted, gradient)

        def step_textbook(x):
            wanted = (module.in_proj_weight, module.out_proj.weight, module.in_proj_bias, module.out_proj.bias)
            w_in, w_o, b_in, b_o = torch.autograd.grad(textbook(module, x), wanted, gradient)
            b_q, _, b_v = b_in.chunk(3)
            return *w_in.chunk(3), w_o, b_q, b_v, b_o

        def same(x):
            return same_algorithm_torch(x, *weights, *biases)

        def ours(x):
            return clue_attention(*x, *weights, *biases, num_heads=HEADS)

        run = step if backward else no_grad
        baselines = {
            "textbook": step_textbook if backward else no_grad(lambda x: textbook(module, x)),
            "same_algorithm_torch": run(same),
        }
        if device.type == "cuda" and (D, V) == MODELS[FIRST] and (queries, each) == (1, 100) and not backward:
            baselines["torch_compile"] = no_grad(compiled(lambda x: textbook(module, x), device))
        if queries * each > 1000 and device.type == "cpu":
            del baselines["textbook"]  # tens of GB
        check = gradient_error if backward else relative
        return Case(sets, run(ours), baselines, check, distinct_bytes(x), flops(x, 3 if backward else 1))

    return case


def projected(Q, each, D, V):
    """Make the case of inference with fixed weights, for which all rows were projected before."""

    def case(device):
        x = make_documents(Q, each, False, D, V, device)[0]
        module = make_module(D, x)
        w_q, w_k, w_v, w_o, b_q, b_k, b_v, b_o = (y.detach() for group in weights_of(module) for y in group)
        table = ProjectedTable(x.table, w_k, w_v, b_k, b_v, budget_bytes=4 << 30)
        documents = (x.query_embeds, x.query_mask, x.document_ids, x.document_mask, x.query_index)
        keys, values = torch.zeros_like(x.table), torch.zeros_like(x.table)
        distinct = x.document_ids[x.document_mask].unique()
        keys[distinct], values[distinct] = x.table[distinct] @ w_k.T, x.table[distinct] @ w_v.T
        keys += b_k

        def ours(_):
            return table.attend(*documents, w_q, w_o, b_q, b_o, num_heads=HEADS)

        def absorbed(_):
            with torch.no_grad():
                return clue_attention(*x, w_q, w_k, w_v, w_o, b_q, b_k, b_v, b_o, num_heads=HEADS)

        baselines = {
            "same_algorithm_torch": lambda _: projected_torch(x, keys, values, w_q, w_o, b_q, b_v, b_o),
            "clue_attention": absorbed,
        }
        work = 2 * len(x.query_index) * x.query_embeds.shape[1] * D**2
        return Case([x], ours, baselines, relative, 2 * distinct_bytes(x), work)

    return case


WORKS = {
    "tiny": make(2, 5, False, 64, 500, True, T=3, S=40),
    **works("clue_attention", make),
    "clue_attention/1x100/projected": projected(1, 100, *MODELS[FIRST]),
}
CPU = (
    "clue_attention/1x100",
    "clue_attention/4x8",
    "clue_attention/1x100/backward",
    "clue_attention/4x8/backward",
    "clue_attention/1x100/projected",
)


@pytest.mark.parametrize("function", ["ours", "textbook", "same_algorithm_torch"])
def test_tiny(benchmark, function):
    run_tiny(benchmark, WORKS, function)


def test_same_algorithm_on_a_gpu_is_the_same():
    x = make_documents(2, 5, False, 64, 500, torch.device("cpu"), T=3, S=40)[0]
    weights, biases = weights_of(make_module(64, x))
    relative(*(f(x, *weights, *biases).detach() for f in (same_algorithm_by_queries, same_algorithm_by_pairs)))


if __name__ == "__main__":
    main("clue_attention", WORKS, CPU)
