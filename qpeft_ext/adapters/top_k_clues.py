"""Q-PEFT-R: the k tokens most similar to the query, each re-embedded by a small MLP."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import QPeftConfig
from ..lm.state import writes
from ..ops import similarity_topk
from ..ops.similarity_topk import SimilarityTopK
from ..ops.vocabulary_topk import row_scales, vocabulary_topk
from .filters import ClueFilter
from .inputs import ClueInputs
from .layers import ClueEmbeddings, Clues, Float32Module, Projection, ResidualMLP, SharedClues, resolved_rank


class TopKClues(Float32Module):
    """Q-PEFT-R: the k tokens most similar to any query token, each re-embedded by a small MLP.

    Each distinct token id u of the source has the score s(u) = max_i sim(e_q(q_i), E[u]) over the query tokens q_i.
    Clues come in the order of their scores, larger first, ties in the order in which the ids occur. With fewer than k
    candidates there are fewer clues; masked and template tokens are never taken.

    The source is the pair's document, or one list of clues per query: the query's concatenated candidate documents,
    the whole vocabulary, or the k neighbours in the vocabulary of every query token, other than itself.

    With ``score_gate`` e_q is a trained projection of E, and a clue vector is multiplied by 2·σ(a·(s − s̄) + b), s̄ the
    mean over the pair's clues: the loss then trains the scores of the chosen clues, as in a top-k router. Training
    chooses 2k, so that tokens just below the cut can move up. Without it e_q is E itself and the choice is fixed.

    Args:
        config: resolved `QPeftConfig`.
        table: E, the LM's input embeddings, [V, D].
        allowed: bool [V]; False for ids that never qualify (special tokens and the filters).
    Example:
        >>> import qpeft_ext as qpeft
        >>> from qpeft_ext.lm.loading import BASE_LM
        >>> model = qpeft.get_qpeft_model(qpeft.load_lm(BASE_LM), qpeft.QPeftConfig(clues="top_k", k=3))
        >>> isinstance(model.clues, qpeft.TopKClues)
        True
        >>> batch = model.encode([("why are there tides?", "The moon pulls the sea, and the tides rise and fall.")])
        >>> clues = model.compute_clues(batch, explain=True)
        >>> list(clues.embeds.shape)
        [1, 3, 192]
        >>> [model.tokenizer.decode([i]) for i in clues.explanation["clue_ids"][0].tolist()]
        ['s', 'ti', 'de']
    """

    def __init__(self, config: QPeftConfig, table: Tensor, allowed: Tensor) -> None:
        super().__init__()
        width = table.shape[1]
        self.k, self.source, self.similarity = config.k, config.source, config.similarity
        self.random_seed = config.seed if config.selection == "random" else None
        self.filter = ClueFilter(allowed, "query_tokens" in config.filters)
        rank = resolved_rank(config)
        self.embeddings = ClueEmbeddings(config.clue_embeddings, table, rank)
        self.mlp = ResidualMLP(width, rank, config.residual)
        self.query_projection = Projection(width, rank, bias=False) if config.score_gate else None
        if config.score_gate:
            self.gate = nn.Parameter(torch.tensor([1.0, 0.0]))  # a, b
        self._inverse_norms: tuple[tuple, Tensor, Tensor] | None = None

    def __getstate__(self) -> dict:
        # known by the table's address, which means nothing in another process
        return self.__dict__ | {"_inverse_norms": None}

    def select(self, inputs: ClueInputs, table: Tensor) -> SimilarityTopK:
        """Choose the clues.

        Args:
            inputs: the pairs.
            table: E, [V, D].
        Returns: R lists of clues: one per pair for the source "document", one per query for others.
        """
        trained = self.query_projection is not None
        k = 2 * self.k if trained and self.training else self.k
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):  # the frozen table's scores train nothing
            query_embeds = table[inputs.query_ids]
            if self.query_projection is not None:
                query_embeds = self.query_projection(query_embeds).to(table.dtype)
            if self.source == "vocabulary_per_token":
                return self._neighbours(inputs, query_embeds, table, k)
            Q = len(inputs.query_ids)
            query_index = inputs.query_index if self.source == "document" else torch.arange(Q, device=table.device)
            if self.source == "vocabulary":
                ids = self._vocabulary(query_embeds, inputs, table, k)
                mask = ids >= 0
            else:
                ids, mask = inputs.document_ids, self.filter.tokens(inputs, query_index)
            if self.random_seed is not None:
                return _random_choice(ids, mask, _seeds(inputs, query_index, self.random_seed), k)
            documents = table, ids, mask, query_index
            return similarity_topk(query_embeds, inputs.query_mask, *documents, k, self.similarity)

    def _vocabulary(self, query_embeds: Tensor, inputs: ClueInputs, table: Tensor, k: int, per_token=False) -> Tensor:
        inverse_norms = self._inverse_norms_of(table) if self.similarity == "cosine" else None
        allowed = self.filter.ids(inputs)
        return vocabulary_topk(
            query_embeds, inputs.query_mask, table, allowed, k, self.similarity, per_token, inverse_norms
        )

    def _neighbours(self, inputs: ClueInputs, query_embeds: Tensor, table: Tensor, k: int) -> SimilarityTopK:
        """The k ids most similar to each query token, without the token itself: [Q, T · k], token after token."""
        Q, T, D = query_embeds.shape
        ids = self._vocabulary(query_embeds, inputs, table, k + 1, per_token=True)
        tokens = inputs.query_mask.flatten().nonzero()[:, 0]  # N tokens, each a query of its own
        ids, own = ids.view(Q * T, k + 1)[tokens], inputs.query_ids.flatten()[tokens]
        found = similarity_topk(
            query_embeds.reshape(Q * T, 1, D)[tokens], torch.ones_like(own, dtype=torch.bool)[:, None], table,
            ids, (ids >= 0) & (ids != own[:, None]), torch.arange(len(own), device=own.device), k, self.similarity,
        )  # fmt: skip
        # each query was one token, so `found.query_positions` is 0 everywhere
        positions = torch.where(found.clue_ids >= 0, (tokens % T)[:, None], -1)
        lists = (found.scores, -torch.inf), (found.clue_ids, -1), (positions, -1)
        return SimilarityTopK(*(
            x.new_full((Q * T, k), padding).index_copy(0, tokens, x).view(Q, T * k) for x, padding in lists
        ))  # fmt: skip

    def _inverse_norms_of(self, table: Tensor) -> Tensor:
        """1 / norm of the table's rows, computed once as long as the table stays."""
        state = table.data_ptr(), writes(table), table.dtype
        if self._inverse_norms is None or self._inverse_norms[0] != state:
            # with the table, so that no other can take its address
            self._inverse_norms = state, row_scales(table), table.detach()
        return self._inverse_norms[1]

    def forward(self, inputs: ClueInputs, table: Tensor, scale: float, explain: bool = False) -> Clues:
        """Compute the clues of B pairs.

        Args:
            inputs: the pairs.
            table: the LM's frozen embedding table, [V, D].
            scale: what the LM's embedding module multiplies a row of the table with.
            explain: whether the result has an explanation.
        """
        selected = self.select(inputs, table)
        mask = selected.clue_ids >= 0
        rows = self.embeddings(table, selected.clue_ids.clamp_min(0), self.mlp.up.weight.dtype)
        embeds = self.mlp(rows) * scale * mask[..., None]
        facts = selected._asdict()
        if self.query_projection is not None:
            facts["gates"] = self._gates(selected.scores, mask)
            embeds = embeds * facts["gates"][..., None]
        clues = Clues(embeds, mask, facts if explain else None)
        return clues if self.source == "document" else SharedClues(clues, inputs.query_index)

    def _gates(self, scores: Tensor, mask: Tensor) -> Tensor:
        """2·σ(a·(s − s̄) + b), [R, K]: 1 for a clue of average score."""
        scores = scores.masked_fill(~mask, 0).to(self.gate.dtype)
        mean = scores.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)
        return 2 * torch.sigmoid(self.gate[0] * (scores - mean) + self.gate[1])


def _random_choice(ids: Tensor, mask: Tensor, seeds: Tensor, k: int) -> SimilarityTopK:
    """Choose k distinct ids of each row [R, S] by a hash of the row's seed and the id: the paper's ablation."""
    keys = _mix(ids ^ seeds[:, None]).masked_fill(~mask, _LAST)
    keys, order = keys.sort(dim=1)
    repeated = torch.zeros_like(mask)
    repeated[:, 1:] = keys[:, 1:] == keys[:, :-1]  # within a row, equal keys are equal ids
    keys, again = keys.masked_fill(repeated, _LAST).sort(dim=1, stable=True)
    missing = max(k - ids.shape[1], 0)
    chosen = nn.functional.pad(ids.gather(1, order).gather(1, again), (0, missing))[:, :k]
    found = nn.functional.pad(keys < _LAST, (0, missing))[:, :k]
    scores = torch.where(found, 1.0, -torch.inf)
    return SimilarityTopK(scores, chosen.where(found, -1), torch.full_like(chosen, -1))


def _seeds(inputs: ClueInputs, query_index: Tensor, seed: int) -> Tensor:
    """A number for each (query, document), a function of their token ids and the seed, int64 [R]."""

    def digest(ids: Tensor, mask: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device) << 32
        return _mix(ids + places).masked_fill(~mask, 0).sum(1)

    queries = digest(inputs.query_ids, inputs.query_mask)[query_index]
    documents = digest(inputs.document_ids, inputs.document_mask)
    return _mix(_mix(queries + seed) + documents)


_LAST = torch.iinfo(torch.int64).max


def _mix(x: Tensor) -> Tensor:
    """Scramble int64 numbers one to one (the finaliser of splitmix64); integer products wrap."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))
