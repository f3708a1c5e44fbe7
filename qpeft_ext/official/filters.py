"""The official filters, with their faults."""

from __future__ import annotations

import string

import torch
from torch import Tensor

from ..adapters.filters import stop_words
from .prompt import BOS, EOS

_LETTERS = frozenset(string.ascii_letters)


def allowed_pieces(tokenizer, vocabulary: int, filters: tuple[str, ...]) -> Tensor:
    """Token ids that may become clues: bool [V]; BOS and EOS never may.

    Both filters look at the vocabulary's own pieces. ``stop_words`` takes the ASCII "_" out of them where "▁" is meant,
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
