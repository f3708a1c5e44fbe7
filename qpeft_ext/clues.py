"""The trained part: clues that a query extracts from a document (Q-PEFT-R and Q-PEFT-A).

Both modules read document tokens as ids into the LM's frozen embedding table and return vectors in the space of
``inputs_embeds``: a table row times whatever scale the LM's embedding module applies.
Source: Q-PEFT, https://arxiv.org/abs/2404.04522.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .batch import ClueInputs
from .config import QPeftConfig
from .ops import ProjectedTable, clue_attention, similarity_topk
from .ops.clue_attention import attention_weights


@dataclass
class Clues:
    """Virtual tokens of B pairs.

    embeds: [B, K, D] float32 in ``inputs_embeds`` space.  mask: [B, K] bool, True where there is a clue.
    explanation: dict of tensors that says which document tokens, with which weight (None unless asked for):
        top_k: clue_ids, scores, query_positions [B, K];  attention: weights [B, H, T, S].
    """

    embeds: Tensor
    mask: Tensor
    explanation: dict[str, Tensor] | None = None


class ResidualMLP(nn.Module):
    """x + W₂·relu(W₁·x + b₁) + b₂ of inner width ``rank``: the identity at the start (W₂ = b₂ = 0)."""

    def __init__(self, width: int, rank: int | None) -> None:
        super().__init__()
        self.up = nn.Linear(width, rank or width)
        self.down = nn.Linear(rank or width, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Projection(nn.Module):
    """A [D, D] projection and its bias: I + A·B of ``rank``, the identity at the start, or a full matrix."""

    def __init__(self, width: int, rank: int | None) -> None:
        super().__init__()
        if rank is None:
            self.weight = nn.Parameter(torch.eye(width))
        else:
            self.a = nn.Parameter(torch.zeros(width, rank))
            self.b = nn.Parameter(torch.randn(rank, width) / rank**0.5)
        self.bias = nn.Parameter(torch.zeros(width))

    def matrix(self, dtype: torch.dtype) -> Tensor:
        if hasattr(self, "weight"):
            return self.weight.to(dtype)
        return torch.addmm(torch.eye(len(self.a), device=self.a.device), self.a, self.b).to(dtype)


class TopKClues(nn.Module):
    """Q-PEFT-R: the k document tokens most similar to any query token, each re-embedded by a small MLP.

    s(u) = max_i sim(E[q_i], E[u]) for each distinct token id u of the document; larger s first, ties to the id that
    occurs earlier. Fewer than k candidates give fewer clues, none gives none: never random, masked or template tokens.

    Args:
        config: resolved `QPeftConfig`.  width: D.
        allowed: bool [V]; False for ids that never qualify (special tokens and the filters).
    """

    def __init__(self, config: QPeftConfig, width: int, allowed: Tensor) -> None:
        super().__init__()
        self.k, self.similarity, self.seed = config.k, config.similarity, config.seed
        self.random = config.selection == "random"
        self.drop_query_tokens = "query_tokens" in config.filters
        self.mlp = ResidualMLP(width, config.rank)
        self.register_buffer("allowed", allowed, persistent=False)

    def candidates(self, inputs: ClueInputs) -> Tensor:
        """The document tokens that may become clues, bool [B, S]."""
        ids = inputs.document_ids
        mask = inputs.document_mask & self.allowed[ids]
        if self.drop_query_tokens:
            in_query = self.allowed.new_zeros(len(inputs.query_ids), len(self.allowed))
            rows, columns = inputs.query_mask.nonzero(as_tuple=True)
            in_query[rows, inputs.query_ids[rows, columns]] = True
            mask &= ~in_query[inputs.query_index[:, None], ids]
        return mask

    def select(self, inputs: ClueInputs, table: Tensor):
        """Scores, clue ids and query positions, each [B, k] (`similarity_topk`)."""
        mask = self.candidates(inputs)
        if self.random:
            table, metric = _random_directions(table, self.seed), "dot"
        else:
            metric = self.similarity
        with torch.no_grad():  # the frozen table's scores train nothing
            query_embeds = table[inputs.query_ids]
            return similarity_topk(
                query_embeds, inputs.query_mask, table, inputs.document_ids, mask, inputs.query_index, self.k, metric
            )

    def forward(
        self, inputs: ClueInputs, table: Tensor, scale: float, explain: bool = False, alone: bool = False
    ) -> Clues:
        """Clues of B pairs. ``table`` [V, D] is the LM's frozen embedding table, ``scale`` its factor."""
        selected = self.select(inputs, table)
        mask = selected.clue_ids >= 0
        rows = table[selected.clue_ids.clamp_min(0)].to(self.mlp.up.weight.dtype)
        embeds = self.mlp(rows) * scale * mask[..., None]
        return Clues(embeds, mask, selected._asdict() if explain else None)


class AttentionClues(nn.Module):
    """Q-PEFT-A: multi-head attention of the query tokens over all document tokens, then the same MLP.

    One clue per query token. Equal to `torch.nn.MultiheadAttention` without attention dropout. A document without any
    token gives no clues.

    Attributes:
        projected_bytes: budget for keys and values of the table rows seen so far, which are reused between calls
            without gradient (`ProjectedTable`); 0 keeps none. ``projected_bytes_used`` says what is held now.
    """

    def __init__(self, config: QPeftConfig, width: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (Projection(width, config.rank) for _ in range(4))
        self.dropout = nn.Dropout(config.dropout)
        self.mlp = ResidualMLP(width, config.rank)
        self.projected_bytes = 0
        self._projected: tuple[tuple, ProjectedTable] | None = None

    @property
    def projected_bytes_used(self) -> int:
        return self._projected[1].used_bytes if self._projected else 0

    def _projected_table(self, table: Tensor, w_k: Tensor, w_v: Tensor, b_k: Tensor, b_v: Tensor) -> ProjectedTable:
        """The rows projected so far; none when the table or a weight has changed since."""
        state = tuple((t.data_ptr(), t._version) for t in (table, *self.k.parameters(), *self.v.parameters()))
        state += (self.projected_bytes,)
        if self._projected is None or self._projected[0] != state:
            fresh = ProjectedTable(table, w_k, w_v, b_k, b_v, budget_bytes=self.projected_bytes)
            self._projected = (state, fresh)
        return self._projected[1]

    def forward(
        self, inputs: ClueInputs, table: Tensor, scale: float, explain: bool = False, alone: bool = False
    ) -> Clues:
        """Clues of B pairs. ``table`` [V, D] is the LM's frozen embedding table, ``scale`` its factor.

        ``alone``: nothing computed for another call is reused: the result hangs on the inputs alone, to the bit.
        """
        projections = (self.q, self.k, self.v, self.o)
        weights = [p.matrix(table.dtype) for p in projections]
        biases = [p.bias.to(table.dtype) for p in projections]
        documents = (inputs.query_mask, table, inputs.document_ids, inputs.document_mask, inputs.query_index)
        query_embeds = table[inputs.query_ids]
        if self.projected_bytes and not alone and not torch.is_grad_enabled():
            store = self._projected_table(table, *weights[1:3], *biases[1:3])
            mixed = store.attend(query_embeds, inputs.query_mask, *documents[2:], weights[0], weights[3], biases[0],
                                 biases[3], num_heads=self.num_heads)  # fmt: skip
        else:
            mixed = clue_attention(query_embeds, *documents, *weights, *biases, num_heads=self.num_heads)
        mask = inputs.query_mask[inputs.query_index] & inputs.document_mask.any(1, keepdim=True)
        embeds = self.mlp(self.dropout(mixed.to(self.mlp.up.weight.dtype))) * scale * mask[..., None]
        explanation = None
        if explain:
            explanation = {
                "weights": attention_weights(
                    query_embeds, *documents, *weights[:2], *biases[:2], num_heads=self.num_heads
                )
            }
        return Clues(embeds, mask, explanation)


def build_clues(config: QPeftConfig, width: int, tokenizer, vocabulary: int) -> nn.Module | None:
    """The clue module of a resolved config; None for ``clues="none"`` (UPR)."""
    if config.clues == "none":
        return None
    if config.clues == "attention":
        return AttentionClues(config, width)
    return TopKClues(config, width, allowed_ids(tokenizer, vocabulary, config.filters))


def allowed_ids(tokenizer, vocabulary: int, filters: tuple[str, ...] = ()) -> Tensor:
    """Token ids that may become clues: bool [V]. Special tokens never may.

    ``stop_words`` (the English list of bm25s) and ``non_alphabetic`` (no letter of any script and no digit) look at
    the decoded piece, not at the raw vocabulary string.
    """
    allowed = torch.ones(vocabulary, dtype=torch.bool)
    allowed[[i for i in tokenizer.all_special_ids if i < vocabulary]] = False
    words = [name for name in filters if name in ("stop_words", "non_alphabetic")]
    if words:
        stop_words = _stop_words() if "stop_words" in words else frozenset()
        pieces = tokenizer.batch_decode([[i] for i in range(min(vocabulary, len(tokenizer)))])
        for i, piece in enumerate(pieces):
            word = piece.strip().casefold()
            if word in stop_words or ("non_alphabetic" in words and not any(c.isalnum() for c in word)):
                allowed[i] = False
    return allowed


def _stop_words() -> frozenset[str]:
    try:
        from bm25s.stopwords import STOPWORDS_EN_PLUS as words
    except ImportError:
        raise ImportError("the stop_words filter takes its list from bm25s; pip install 'qpeft_ext[bm25]'") from None
    return frozenset(words)


def _random_directions(table: Tensor, seed: int) -> Tensor:
    """A one-column table of random numbers: the same order of tokens for every query, decided by the seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(table), 1, generator=generator).to(table.device) + 0.5
