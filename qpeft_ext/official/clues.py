"""The official clue modules: a trained copy of the whole table, an MLP without residual, hints framed by words."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.filters import ClueFilter, stop_words
from ..adapters.inputs import ClueInputs
from ..adapters.layers import ClueEmbeddings, Clues, Float32Module
from ..config import QPeftConfig
from ..ops.similarity_topk import SimilarityTopK, round_scores
from .prompt import BOS, EOS, OfficialTokens

Decode = Callable[[list[int]], str]
_LISTED = 1000  # (query token, position) pairs that are looked at, best first


class OfficialClues(Float32Module):
    """Base of both clue modules: the clues of a pair are virtual tokens between those of "hints: " and a newline.

    Args:
        config: a resolved config.
        table: E, the LM's input embeddings, [V, D].
        tokens: template words that the module reads.
        allowed: which token ids may become clues, bool [V] (`allowed_pieces`).
        decode: token ids to text, for errors.
    """

    hints: Tensor
    newline: Tensor
    question: Tensor

    def __init__(
        self, config: QPeftConfig, table: Tensor, tokens: OfficialTokens, allowed: Tensor, decode: Decode
    ) -> None:
        super().__init__()
        width = table.shape[1]
        self.filter = ClueFilter(allowed, "query_tokens" in config.filters)
        self.embeddings = ClueEmbeddings("full", table, None)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        for name in ("hints", "newline", "question"):
            self.register_buffer(name, torch.tensor(getattr(tokens, name)), persistent=False)
        self.decode = decode

    def read(self, inputs: ClueInputs) -> ClueInputs:
        """Add "Question: \\n" to the end of every document."""
        B = len(inputs.document_ids)
        ids = torch.cat([inputs.document_ids, self.question.expand(B, -1)], 1)
        mask = torch.cat([inputs.document_mask, inputs.document_mask.new_ones(B, len(self.question))], 1)
        return replace(inputs, document_ids=ids, document_mask=mask)

    def refuse(self, inputs: ClueInputs, wrong: Tensor, reason: str) -> None:
        """Raises: ValueError that gives the first pair where ``wrong`` [B] is True, and the reason."""
        for i in wrong.nonzero()[:1, 0].tolist():
            q = inputs.query_index[i]
            query = self.decode(inputs.query_ids[q][inputs.query_mask[q]].tolist())
            document = self.decode(inputs.document_ids[i][inputs.document_mask[i]].tolist())
            raise ValueError(f"compat='official', query {query!r} and document {document[:60]!r}: {reason}")


class OfficialTopKClues(OfficialClues):
    """Q-PEFT-R of the official code, where it is mode 3.

    Every query token, embedded by the trained table, is compared with every position of document part, BOS, query and
    EOS, embedded by E; σ(similarity) of BOS, query and EOS is 0. Of the best 1000 (query token, position) pairs, larger
    first, the distinct tokens that pass the filters are taken in order, and the first k are the clues: query tokens
    too, where no others are left, and words of the template. If none passes, no filter is in force and tokens may
    repeat. Ties, which the official code leaves to `torch.topk`, go to the earlier query token, then to the earlier
    position, and similarities that differ by rounding only are ties (`round_scores`).

    Raises: ValueError in `forward` for a pair with some, but fewer than k tokens: the official code fills up at random.
    """

    def __init__(
        self, config: QPeftConfig, table: Tensor, tokens: OfficialTokens, allowed: Tensor, decode: Decode
    ) -> None:
        super().__init__(config, table, tokens, allowed, decode)
        self.k, self.similarity = config.k, config.similarity

    @torch.no_grad()
    def select(self, inputs: ClueInputs, table: Tensor) -> SimilarityTopK:
        """Select the clues of each pair, [B, k]."""
        read = self.read(inputs)
        query_ids, query_mask = inputs.query_ids[inputs.query_index], inputs.query_mask[inputs.query_index]  # [B, T]
        one = torch.ones_like(query_mask[:, :1])
        ids = torch.cat([read.document_ids, one * BOS, query_ids, one * EOS], 1)  # [B, S]
        there = torch.cat([read.document_mask, one, query_mask, one], 1)
        hidden = torch.arange(ids.shape[1], device=ids.device) >= read.document_ids.shape[1]
        scores = torch.sigmoid(self._similarities(inputs, table, ids)).masked_fill(hidden, 0)  # [B, T, S]
        scores = scores.masked_fill(~(query_mask[:, :, None] & there[:, None]), -1)  # padding ranks last
        scores, order = scores.flatten(1).sort(dim=1, descending=True, stable=True)
        scores, order = scores[:, :_LISTED], order[:, :_LISTED]
        listed_ids = ids.gather(1, order % ids.shape[1])
        listed = (scores >= 0) & (listed_ids != BOS) & (listed_ids != EOS)
        allowed = self.filter.ids(inputs)
        passed = allowed[inputs.query_index[:, None] if len(allowed) > 1 else 0, listed_ids]
        passed = listed & passed & _first_of_each(listed_ids)
        passed = torch.where(passed.any(1, keepdim=True), passed, listed)
        count = passed.cumsum(1)
        self.refuse(
            inputs,
            count[:, -1] < self.k,
            f"fewer than k={self.k} tokens can be clues, and the official code "
            "would draw the others at random; lower k, or drop filters",
        )
        taken = passed & (count <= self.k)
        chosen = (x[taken].view(-1, self.k) for x in (scores, listed_ids, order // ids.shape[1]))
        return SimilarityTopK(*chosen)

    def _similarities(self, inputs: ClueInputs, table: Tensor, ids: Tensor) -> Tensor:
        """Compute the similarity of every query token and every position of ``ids`` [B, S]: float32 [B, T, S]."""
        distinct, place = ids.unique(return_inverse=True)
        queries, keys = self.embeddings.weight[inputs.query_ids], table[distinct].float()
        if self.similarity == "cosine":
            queries, keys = (nn.functional.normalize(rows, dim=-1) for rows in (queries, keys))
        found = round_scores(queries @ keys.T)  # [Q, T, U]
        tokens = torch.arange(found.shape[1], device=ids.device)
        return found[inputs.query_index[:, None, None], tokens[:, None], place[:, None]]

    def forward(self, inputs: ClueInputs, table: Tensor, scale: float, explain: bool = False) -> Clues:
        """Compute the clues of B pairs and the words around them; facts about these words are -1."""
        selected = self.select(inputs, table)
        B, words = len(selected.clue_ids), (len(self.hints), len(self.newline))
        ids = torch.cat([self.hints.expand(B, -1), selected.clue_ids, self.newline.expand(B, -1)], 1)
        embeds = self.mlp(self.embeddings(table, ids, table.dtype)) * scale
        facts = {name: nn.functional.pad(fact, words, value=-1) for name, fact in selected._asdict().items()}
        return Clues(embeds, torch.ones_like(ids, dtype=torch.bool), facts if explain else None)


class OfficialAttentionClues(OfficialClues):
    """Q-PEFT-A of the official code, where it is mode 4: a `torch.nn.MultiheadAttention`, one clue per query token.

    Queries are embedded by the trained table; keys and values are E of the document part, template words included,
    without filtered tokens. ``config.dropout`` is that of the attention weights.

    Raises: ValueError in `forward` for a pair with every key filtered: the official code gives NaN.
    """

    def __init__(
        self, config: QPeftConfig, table: Tensor, tokens: OfficialTokens, allowed: Tensor, decode: Decode
    ) -> None:
        super().__init__(config, table, tokens, allowed, decode)
        self.attention = nn.MultiheadAttention(table.shape[1], config.num_heads, config.dropout, batch_first=True)

    def forward(self, inputs: ClueInputs, table: Tensor, scale: float, explain: bool = False) -> Clues:
        """Compute the clues of B pairs and the words around them."""
        read = self.read(inputs)
        keys = self.filter.tokens(read, inputs.query_index)
        self.refuse(
            inputs,
            ~keys.any(1),
            "the filters leave no token to attend to, and the official code would give NaN; drop filters",
        )
        queries = self._rows(table, inputs.query_ids)[inputs.query_index]  # [B, T, D]
        rows = table[read.document_ids].to(queries.dtype)
        mixed, weights = self.attention(queries, rows, rows, key_padding_mask=~keys, need_weights=explain,
                                        average_attn_weights=False)  # fmt: skip
        B, mask = len(rows), inputs.query_mask[inputs.query_index]
        around = [self._rows(table, words).expand(B, -1, -1) for words in (self.hints, self.newline)]
        embeds = self.mlp(torch.cat([around[0], mixed, around[1]], 1)) * scale
        mask = nn.functional.pad(mask, (len(self.hints), len(self.newline)), value=True)
        return Clues(embeds, mask, {"weights": weights} if explain else None)

    def _rows(self, table: Tensor, ids: Tensor) -> Tensor:
        return self.embeddings(table, ids, table.dtype)


def build_official_clues(config: QPeftConfig, table: Tensor, tokenizer: Any) -> OfficialClues:
    """Make the official clue module of a resolved config over an embedding table [V, D]."""
    kind = OfficialTopKClues if config.clues == "top_k" else OfficialAttentionClues
    allowed = allowed_pieces(tokenizer, len(table), config.filters)
    return kind(config, table, OfficialTokens.of(tokenizer), allowed, tokenizer.decode)


def _first_of_each(ids: Tensor) -> Tensor:
    """Mark the first occurrence of each id in its row, [B, N] -> bool [B, N]."""
    ordered, places = ids.sort(dim=1, stable=True)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.empty_like(first).scatter_(1, places, first)


_LETTERS = frozenset(string.ascii_letters)


def allowed_pieces(tokenizer: Any, vocabulary: int, filters: tuple[str, ...]) -> Tensor:
    """Find the token ids that may become clues, bool [V]; BOS and EOS never may.

    Both filters look at pieces of the vocabulary. ``stop_words`` takes the ASCII "_" out of them where "▁" is meant,
    so that it finds stop words inside of words only ("the", not "▁the"); the list is that of bm25s, not the official
    one, which has no licence. ``non_alphabetic`` asks for an ASCII letter: it keeps byte pieces such as "<0x0A>" and
    drops digits and every other script.
    """
    allowed = torch.ones(vocabulary, dtype=torch.bool)
    allowed[[BOS, EOS]] = False
    words = stop_words() if "stop_words" in filters else frozenset()
    for i, piece in enumerate(tokenizer.convert_ids_to_tokens(range(min(vocabulary, len(tokenizer))))):
        if piece.replace("_", "") in words or ("non_alphabetic" in filters and not _LETTERS & set(piece)):
            allowed[i] = False
    return allowed
