"""Inputs of the operators in odd sizes: first document empty, last full, repeated ids, queries out of order."""

from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    query_embeds: Tensor  # [Q, T, D]
    query_mask: Tensor  # [Q, T]
    table: Tensor  # [V, D]
    document_ids: Tensor  # [B, S]
    document_mask: Tensor  # [B, S]
    query_index: Tensor  # [B]


def make_documents(Q=3, T=5, D=16, V=29, B=7, S=23, dtype=torch.float32, device="cpu", seed=0) -> Documents:
    random = torch.Generator().manual_seed(seed)
    lengths = torch.arange(B) * S // max(B - 1, 1)  # first empty, last full
    query_lengths = 1 + torch.arange(Q) * (T - 1) // max(Q - 1, 1)  # first one token, last all
    query_index = torch.randint(Q, (B,), generator=random) if Q else torch.zeros(B, dtype=torch.int64)
    documents = Documents(
        torch.randn(Q, T, D, generator=random, dtype=torch.float64).to(dtype),
        torch.arange(T) < query_lengths[:, None],
        torch.randn(V, D, generator=random, dtype=torch.float64).to(dtype),
        torch.randint(V, (B, S), generator=random),
        torch.arange(S) < lengths[:, None],
        query_index,
    )
    holes = torch.rand(B, S, generator=random) < 0.2  # masks need not be prefixes
    holes[-1:] = False
    documents = documents._replace(document_mask=documents.document_mask & ~holes)
    return Documents(*(x.to(device) for x in documents))


def to_float64(inputs: tuple) -> tuple:
    """Return the same numbers in float64, where they are exact, so that their dtype costs no accuracy."""
    return tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def poisoned(x: Documents) -> Documents:
    """Spoil everything that must not be read: ids in turn -1, V + 5 and far away, NaN in masked query tokens."""
    junk = torch.tensor([-1, x.table.shape[0] + 5, 2**40], device=x.document_ids.device)
    junk = junk[torch.arange(x.document_ids.numel(), device=junk.device) % 3].view_as(x.document_ids)
    return x._replace(
        document_ids=torch.where(x.document_mask, x.document_ids, junk),
        query_embeds=x.query_embeds.masked_fill(~x.query_mask[:, :, None], torch.nan),
    )
