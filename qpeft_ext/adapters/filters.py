"""Which token ids may become clues."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..utils.optional import import_bm25s
from .inputs import ClueInputs


class ClueFilter(nn.Module):
    """Which document tokens count for which query.

    Args:
        allowed: bool [V] (`allowed_ids`).  drop_query_tokens: whether the query's own tokens are left out too.
    """

    def __init__(self, allowed: Tensor, drop_query_tokens: bool) -> None:
        super().__init__()
        self.drop_query_tokens = drop_query_tokens
        self.register_buffer("allowed", allowed, persistent=False)

    def ids(self, inputs: ClueInputs) -> Tensor:
        """The ids that count for each query, bool [Q, V]; [1, V] where all queries have the same."""
        if not self.drop_query_tokens:
            return self.allowed[None]
        allowed = self.allowed.repeat(len(inputs.query_ids), 1)
        rows, columns = inputs.query_mask.nonzero(as_tuple=True)
        allowed[rows, inputs.query_ids[rows, columns]] = False
        return allowed

    def tokens(self, inputs: ClueInputs, query_index: Tensor) -> Tensor:
        """The tokens of ``inputs.document_ids`` that count, bool; ``query_index``: the query of each of its rows."""
        allowed = self.ids(inputs)
        return inputs.document_mask & allowed[query_index[:, None] if len(allowed) > 1 else 0, inputs.document_ids]


def allowed_ids(tokenizer, vocabulary: int, filters: tuple[str, ...] = ()) -> Tensor:
    """Token ids that may become clues: bool [V]. Special tokens never may.

    ``stop_words`` (the English list of bm25s) and ``non_alphabetic`` (no letter of any script and no digit) look at
    the decoded piece, not at the raw vocabulary string.
    """
    allowed = torch.ones(vocabulary, dtype=torch.bool)
    allowed[[i for i in tokenizer.all_special_ids if i < vocabulary]] = False
    words = [name for name in filters if name in ("stop_words", "non_alphabetic")]
    if words:
        stopped = stop_words() if "stop_words" in words else frozenset()
        pieces = tokenizer.batch_decode([[i] for i in range(min(vocabulary, len(tokenizer)))])
        for i, piece in enumerate(pieces):
            word = piece.strip().casefold()
            if word in stopped or ("non_alphabetic" in words and not any(c.isalnum() for c in word)):
                allowed[i] = False
    return allowed


def stop_words() -> frozenset[str]:
    """The English list of bm25s."""
    try:
        words = import_bm25s("bm25s.stopwords").STOPWORDS_EN_PLUS
    except ImportError:
        raise ImportError("the stop_words filter takes its list from bm25s; pip install 'qpeft_ext[bm25]'") from None
    return frozenset(words)
