"""The choice of token ids that may become clues."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..utils.optional import import_bm25s
from .inputs import ClueInputs


class ClueFilter(nn.Module):
    """Masks of the document tokens that may become clues of a query.

    Args:
        allowed: bool [V] (`allowed_ids`).
        drop_query_tokens: whether the query's own tokens are left out too.
    """

    allowed: Tensor

    def __init__(self, allowed: Tensor, drop_query_tokens: bool) -> None:
        super().__init__()
        self.drop_query_tokens = drop_query_tokens
        self.register_buffer("allowed", allowed, persistent=False)

    def ids(self, inputs: ClueInputs) -> Tensor:
        """The ids that may be clues of each query, bool [Q, V]; [1, V] where they are the same for all queries."""
        if not self.drop_query_tokens:
            return self.allowed[None]
        allowed = self.allowed.repeat(len(inputs.query_ids), 1)
        rows, columns = inputs.query_mask.nonzero(as_tuple=True)
        allowed[rows, inputs.query_ids[rows, columns]] = False
        return allowed

    def tokens(self, inputs: ClueInputs, query_index: Tensor) -> Tensor:
        """The tokens of ``inputs.document_ids`` that may be clues, bool [B, S].

        query_index: the query of each row of ``inputs.document_ids``.
        """
        allowed = self.ids(inputs)
        return inputs.document_mask & allowed[query_index[:, None] if len(allowed) > 1 else 0, inputs.document_ids]


def allowed_ids(tokenizer, vocabulary: int, filters: tuple[str, ...] = ()) -> Tensor:
    """Token ids that may become clues, bool [V]. Special tokens never may.

    Args:
        tokenizer: the LM's.
        vocabulary: V, rows of the embedding table.
        filters: "stop_words" drops the English list of bm25s, "non_alphabetic" drops tokens without a letter of any
            script and without a digit. Both look at the decoded token, not at the raw string of the vocabulary.
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
    """The English list of bm25s.

    Raises: ImportError without bm25s.
    """
    try:
        words = import_bm25s("bm25s.stopwords").STOPWORDS_EN_PLUS
    except ImportError:
        raise ImportError("the stop_words filter takes its list from bm25s: pip install 'qpeft_ext[bm25]'") from None
    return frozenset(words)
