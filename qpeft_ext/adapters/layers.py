"""What clue modules are made of: the result `Clues`, and small trained layers that start at the identity."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


@dataclass
class Clues:
    """Virtual tokens of B pairs.

    embeds: [B, K, D] float32 in ``inputs_embeds`` space.  mask: [B, K] bool, True where there is a clue.
    explanation: dict of tensors that says which document tokens, with which weight (None unless asked for):
        top_k: clue_ids, scores, query_positions [B, K], and gates [B, K] with ``score_gate``;
        attention: weights [B, H, T, S].
    """

    embeds: Tensor
    mask: Tensor
    explanation: dict[str, Tensor] | None = None

    def __getitem__(self, rows) -> Clues:
        """The clues of some pairs; ``rows`` indexes the first axis."""
        facts = self.explanation and {name: fact[rows] for name, fact in self.explanation.items()}
        return Clues(self.embeds[rows], self.mask[rows], facts)


class SharedClues(Clues):
    """Clues of B pairs that share R lists: the vectors are repeated for those pairs only that are asked for.

    Args:
        lists: the clues of each list.  of_pair: the list of each pair, int64 [B].
    """

    def __init__(self, lists: Clues, of_pair: Tensor) -> None:
        self.lists, self.of_pair = lists, of_pair

    def __getitem__(self, rows) -> Clues:
        return self.lists[self.of_pair[rows]]

    embeds = property(lambda self: self.lists.embeds[self.of_pair])
    mask = property(lambda self: self.lists.mask[self.of_pair])
    explanation = property(lambda self: self[:].explanation)


class Float32Module(nn.Module):
    """A module whose weights stay float32: ``half()``, ``to(dtype)`` and the like, on it or around it, only move it.

    In 16 bits, steps of a usual learning rate round to nothing for half of the weights.
    """

    def _apply(self, fn, recurse=True):
        def keeping_dtype(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        return super()._apply(keeping_dtype, recurse)


class ResidualMLP(nn.Module):
    """x + W₂·relu(W₁·x + b₁) + b₂ of inner width ``rank``: the identity at the start (W₂ = b₂ = 0).

    ``residual`` False, for comparison: without the x, random at the start.
    """

    def __init__(self, width: int, rank: int | None, residual: bool = True) -> None:
        super().__init__()
        self.residual = residual
        self.up = nn.Linear(width, rank or width)
        self.down = nn.Linear(rank or width, width)
        if residual:
            nn.init.zeros_(self.down.weight)
            nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        change = self.down(torch.relu(self.up(x)))
        return x + change if self.residual else change


class Projection(nn.Module):
    """x·Wᵀ + bias with W [D, D] = I + A·B of ``rank``, the identity at the start, or a full matrix (``rank`` None)."""

    def __init__(self, width: int, rank: int | None, bias: bool = True) -> None:
        super().__init__()
        if rank is None:
            self.weight = nn.Parameter(torch.eye(width))
        else:
            self.a = nn.Parameter(torch.zeros(width, rank))
            self.b = nn.Parameter(torch.randn(rank, width) / rank**0.5)
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def matrix(self, dtype: torch.dtype) -> Tensor:
        if hasattr(self, "weight"):
            return self.weight.to(dtype)
        return torch.addmm(torch.eye(len(self.a), device=self.a.device), self.a, self.b).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Without making the matrix; in the dtype of the parameters."""
        if hasattr(self, "weight"):
            return nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias)
        x = x.to(self.a.dtype)
        projected = x + (x @ self.b.T) @ self.a.T
        return projected if self.bias is None else projected + self.bias


class ClueEmbeddings(nn.Module):
    """E_c, the table that clue tokens are read from: the LM's own at the start.

    kind: "frozen" (no parameters), "low_rank" (E + A·B) or "full" (a trained float32 copy of E, the official code's
    choice). ``rank`` None means the embedding width for "low_rank".
    """

    def __init__(self, kind: str, table: Tensor, rank: int | None) -> None:
        super().__init__()
        self.kind = kind
        V, D = table.shape
        if kind == "low_rank":
            self.a = nn.Parameter(torch.zeros(V, rank or D))
            self.b = nn.Parameter(torch.randn(rank or D, D) / (rank or D) ** 0.5)
        elif kind == "full":
            self.weight = nn.Parameter(table.detach().float().clone())
            logger.warning(
                "clue_embeddings='full' trains a copy of the embedding table: %s parameters, %.0f MB in "
                "the adapter; 'low_rank' has a fraction of them",
                f"{V * D:,}",
                4e-6 * V * D,
            )

    def forward(self, table: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the ids, ``[*ids.shape, D]``, in ``dtype``; ``table`` is E."""
        if self.kind == "full":
            return self.weight[ids]
        rows = table[ids].to(dtype)
        return rows if self.kind == "frozen" else rows + self.a[ids] @ self.b
