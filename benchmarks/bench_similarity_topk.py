"""similarity_topk against its definition, the official order of computation, and its own algorithm in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from common import Case, distinct_bytes, main, make_documents, run_tiny

from qpeft_ext.ops import similarity_topk
from qpeft_ext.ops.similarity_topk import SimilarityTopK, reference, round_scores

K = 10


def official(query_embeds, query_mask, table, document_ids, document_mask, query_index, k) -> SimilarityTopK:
    """What the official module does (its mode 3, filter "d"), pair by pair and token by token in Python.

    The spans are looked for by token, similarities pass through a sigmoid, the best 1,000 (token, position) pairs
    are walked until k distinct ids are found. It has no batch over documents and no distinct ids.
    """
    rows = []
    for b in range(document_ids.shape[0]):
        query = query_index[b].item()
        span = [j for j in range(document_ids.shape[1]) if document_mask[b, j]]
        tokens = [t for t in range(query_mask.shape[1]) if query_mask[query, t]]
        ids = [document_ids[b, j].item() for j in span]
        documents = torch.nn.functional.embedding(torch.tensor(ids), table)
        queries = query_embeds[query, torch.tensor(tokens)]
        similarity = torch.nn.functional.cosine_similarity(queries[:, None], documents[None], dim=-1)
        order = similarity.sigmoid().flatten().topk(min(1000, similarity.numel())).indices
        chosen: dict[int, tuple[float, int]] = {}
        for index in order.tolist():
            t, j = divmod(index, len(ids))
            if ids[j] not in chosen:
                chosen[ids[j]] = (similarity[t, j].item(), tokens[t])
            if len(chosen) == k:
                break
        missing = k - len(chosen)
        scores, positions = zip(*chosen.values(), strict=True)
        padding = [-1] * missing
        rows.append(([*scores] + [-torch.inf] * missing, [*chosen] + padding, [*positions] + padding))
    return SimilarityTopK(*(torch.tensor(column) for column in zip(*rows, strict=True)))


def same_algorithm_torch(query_embeds, query_mask, table, document_ids, document_mask, query_index, k):
    """Distinct ids once per query, a GEMM per block of rows, maximum over T; dedupe and top-k at once."""
    dtype = torch.float64 if table.dtype == torch.float64 else torch.float32
    best = torch.empty(document_ids.shape, dtype=dtype, device=table.device)
    positions = torch.empty_like(document_ids)
    for query in range(query_embeds.shape[0]):
        pairs = query_index == query
        ids, inverse = document_ids[pairs].where(document_mask[pairs], 0).unique(return_inverse=True)
        unit = torch.nn.functional.normalize(query_embeds[query].to(dtype), dim=-1)
        of_ids, at = [], []
        for block in ids.split(256):
            rows = table[block].to(dtype)
            similarity = (rows @ unit.T) / rows.norm(dim=-1, keepdim=True)
            value, position = similarity.masked_fill(~query_mask[query], -torch.inf).max(1)
            of_ids.append(value)
            at.append(position)
        best[pairs], positions[pairs] = torch.cat(of_ids)[inverse], torch.cat(at)[inverse]
    # an id that stands earlier in the document: a stable sort puts equal ids side by side, first position first
    keys = document_ids.where(document_mask, -1)
    ordered, where = keys.sort(dim=1, stable=True)
    repeated = torch.zeros_like(document_mask)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    found = document_mask & ~torch.empty_like(repeated).scatter_(1, where, repeated)
    scores, order = round_scores(best).masked_fill(~found, -torch.inf).sort(dim=1, descending=True, stable=True)
    scores, order = scores[:, :k], order[:, :k]
    found = found.gather(1, order)
    return SimilarityTopK(
        scores, document_ids.gather(1, order).where(found, -1), positions.gather(1, order).where(found, -1)
    )


def error(ours: SimilarityTopK, theirs: SimilarityTopK) -> float:
    """Largest difference of scores. Ids need not agree where scores tie, also after the official sigmoid."""
    found = ours.scores > -torch.inf
    assert torch.equal(found, theirs.scores > -torch.inf)
    difference = (ours.scores - theirs.scores.to(ours.scores.device))[found].abs().max().item()
    assert difference < 1e-4, f"scores differ by {difference}"
    return difference


def gradient_error(ours, theirs) -> float:
    scale = max(x.abs().max().item() for x in ours)
    difference = max((a - b.to(a.dtype)).abs().max().item() for a, b in zip(ours, theirs, strict=True)) / scale
    assert difference < (1e-3 if ours[0].dtype == torch.float32 else 5e-2), f"gradients differ by {difference}"
    return difference




def forward(Q, each, slow=True, compiled=False, **shape):
    def case(device):
        x = make_documents(Q, each, device, **shape)
        baselines = {"textbook": lambda: reference(*x, K), "same_algorithm_torch": lambda: same_algorithm_torch(*x, K)}
        if slow and device.type == "cpu":
            baselines["official"] = lambda: official(*x, K)
        if compiled:
            baselines["torch_compile"] = torch.compile(lambda: reference(*x, K))
        pairs_of_rows = sum(
            x.document_ids[x.query_index == q][x.document_mask[x.query_index == q]].unique().numel() for q in range(Q)
        )
        flops = 2 * x.query_embeds.shape[1] * x.table.shape[1] * pairs_of_rows
        return Case(lambda: similarity_topk(*x, K), baselines, error, distinct_bytes(x), flops)

    return case


def backward(Q, each, **shape):
    """Forward and backward to the query embeddings."""

    def case(device):
        x = make_documents(Q, each, device, **shape)
        x = x._replace(query_embeds=x.query_embeds.requires_grad_())

        def step(function):
            scores = function(*x, K).scores
            return torch.autograd.grad(scores.masked_fill(scores == -torch.inf, 0).sum(), x.query_embeds)

        baselines = {
            "textbook": lambda: step(reference),
            "same_algorithm_torch": lambda: step(differentiable_in_torch),
        }
        flops = 2 * x.query_embeds.shape[1] * x.table.shape[1] * x.document_ids[x.document_mask].unique().numel()
        return Case(lambda: step(similarity_topk), baselines, gradient_error, distinct_bytes(x), flops)

    return case


def differentiable_in_torch(query_embeds, query_mask, table, document_ids, document_mask, query_index, k):
    """Select without a graph, then the scores of what was chosen with one: the cheap way to a gradient in PyTorch."""
    inputs = (query_mask, table, document_ids, document_mask, query_index)
    with torch.no_grad():
        chosen = same_algorithm_torch(query_embeds, *inputs, k)
    query = query_embeds[query_index[:, None], chosen.query_positions.clamp_min(0)]
    scores = torch.nn.functional.cosine_similarity(query.float(), table[chosen.clue_ids.clamp_min(0)].float(), dim=-1)
    return chosen._replace(scores=scores.where(chosen.clue_ids >= 0, -torch.inf))


WORKS = {
    "tiny": forward(2, 5, T=3, S=40, D=64, V=500),
    "similarity_topk/1x100": forward(1, 100, compiled=True),
    "similarity_topk/4x8": forward(4, 8, shared=True),
    "similarity_topk/32x100": forward(32, 100, slow=False, compiled=True),
    "similarity_topk/1x100/backward": backward(1, 100),
    "similarity_topk/4x8/backward": backward(4, 8, shared=True),
}
CUDA = tuple(w for w in WORKS if w != "tiny")
DEFAULT = {"cpu": tuple(w for w in CUDA if "32x" not in w), "cuda": CUDA}


@pytest.mark.parametrize("function", ["ours", "textbook", "same_algorithm_torch", "official"])
def test_tiny(benchmark, function):
    run_tiny(benchmark, WORKS, function)


if __name__ == "__main__":
    main("similarity_topk", WORKS, DEFAULT)
