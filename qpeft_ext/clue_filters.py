"""Which token ids may become clues."""

from __future__ import annotations

import torch
from torch import Tensor


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
