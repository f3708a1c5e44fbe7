"""The result of a clue module, `Clues`, and the small trained layers that the modules are made of."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import QPeftConfig

logger = logging.getLogger(__name__)


@dataclass
class Clues:
    """Virtual tokens of B pairs.

    Args:
        embeds: vectors in the space of ``inputs_embeds``, [B, K, D] float32.
        mask: bool [B, K], True where there is a clue.
        explanation: tensors that say which document tokens, with which weight; None unless asked for. Of `TopKClues`:
            clue_ids, scores, query_positions, and with ``score_gate`` gates, [B, K]. Of `AttentionClues`: weights,
            [B, H, T, S].
    """

    embeds: Tensor
    mask: Tensor
    explanation: dict[str, Tensor] | None = None

    def __getitem__(self, rows) -> Clues:
        """The clues of some pairs.

        rows: their indices on the first axis.
        """
        facts = self.explanation and {name: fact[rows] for name, fact in self.explanation.items()}
        return Clues(self.embeds[rows], self.mask[rows], facts)


class SharedClues(Clues):
    """Clues of B pairs that share R lists. Vectors are repeated only for the pairs that are asked for.

    Args:
        lists: the clues of each list.
        of_pair: the list of each pair, int64 [B].
    """

    def __init__(self, lists: Clues, of_pair: Tensor) -> None:
        self.lists, self.of_pair = lists, of_pair

    def __getitem__(self, rows) -> Clues:
        return self.lists[self.of_pair[rows]]

    embeds = property(lambda self: self.lists.embeds[self.of_pair])
    mask = property(lambda self: self.lists.mask[self.of_pair])
    explanation = property(lambda self: self[:].explanation)


def resolved_rank(config: QPeftConfig) -> int | None:
    """``rank`` of a resolved config.

    Raises: ValueError where it is a word still ("auto").
    """
    if isinstance(config.rank, str):
        raise ValueError(f"expected a resolved QPeftConfig, got rank={config.rank!r}; use config.resolve(width)")
    return config.rank


class Float32Module(nn.Module):
    """A module whose weights stay float32; ``half()``, ``to(dtype)`` and the like can only change its device.

    In 16 bits, steps of a usual learning rate would round to nothing for half of the weights.
    """

    def _apply(self, fn, recurse=True):
        def keeping_dtype(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        return super()._apply(keeping_dtype, recurse)


class ResidualMLP(nn.Module):
    """x + W₂·relu(W₁·x + b₁) + b₂, which is the identity at the start (W₂ = b₂ = 0).

    Args:
        width: D.
        rank: inner width; None: D.
        residual: False leaves out the x and starts at random, for comparison.
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
    """x·Wᵀ + bias, which is the identity at the start.

    Args:
        width: D.
        rank: of A·B in W = I + A·B; None: W is a full matrix.
        bias: whether there is one.
    """

    def __init__(self, width: int, rank: int | None, bias: bool = True) -> None:
        super().__init__()
        if rank is None:
            self.weight = nn.Parameter(torch.eye(width))
        else:
            self.a = nn.Parameter(torch.zeros(width, rank))
            self.b = nn.Parameter(torch.randn(rank, width) / rank**0.5)
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """W, [D, D]."""
        if hasattr(self, "weight"):
            return self.weight.to(dtype)
        return torch.addmm(torch.eye(len(self.a), device=self.a.device), self.a, self.b).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The projection of x [..., D] without computing W, in the dtype of the parameters."""
        if hasattr(self, "weight"):
            return nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias)
        x = x.to(self.a.dtype)
        projected = x + (x @ self.b.T) @ self.a.T
        return projected if self.bias is None else projected + self.bias


class ClueEmbeddings(nn.Module):
    """E_c, the table that clue tokens are read from; the LM's own E at the start.

    Args:
        kind: "frozen" (E itself, no parameters), "low_rank" (E + A·B) or "full" (a trained float32 copy of E, as in the
            official code).
        table: E, [V, D].
        rank: of A·B; None: D.
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
        """The rows of ``ids``, ``[*ids.shape, D]``, in ``dtype``; ``table`` is E."""
        if self.kind == "full":
            return self.weight[ids]
        rows = table[ids].to(dtype)
        return rows if self.kind == "frozen" else rows + self.a[ids] @ self.b
