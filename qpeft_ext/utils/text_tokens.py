"""Turn users' texts into token ids; the words of a special token (``</s>``, ``<|im_start|>``) are text by default."""

from __future__ import annotations

import copy
import json
import re
import secrets
from typing import Any

_TEXTS_AT_ONCE = 256  # a fast tokenizer keeps a hundred bytes a token until all texts of a call are done


class TextTokenizer:
    """Turn texts into token ids, without special tokens around them.

    Tokens that were added to the vocabulary and are not special stay tokens. A text without the words of a special
    token gets the same ids with both settings. The tokenizer itself is never changed, since other threads may use it.

    Args:
        tokenizer: a transformers tokenizer.
        special_tokens: whether the words of a special token become its id, as the tokenizer itself does.
    """

    def __init__(self, tokenizer, special_tokens: bool) -> None:
        self.tokenizer = tokenizer
        self._special: dict[int, str] = {}
        self._own: Any = None  # a copy of the tokenizer, made when it is first needed
        if special_tokens:
            return
        self._added = {i: str(token.content) for i, token in tokenizer.added_tokens_decoder.items()}
        self._special = {i: self._added[i] for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special |= zip(tokenizer.all_special_ids, map(str, tokenizer.all_special_tokens), strict=True)
        self._unknown = tokenizer.unk_token_id  # which a text without any special token may contain too
        self._control = frozenset(self._special) - {self._unknown}

    def __call__(self, texts: list[str]) -> list[list[int]]:
        rows = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            # verbose=False: a long document is cut by us, so the tokenizer's length warning would be noise
            rows += self.tokenizer(
                texts[start : start + _TEXTS_AT_ONCE],
                add_special_tokens=False,
                verbose=False,
                return_attention_mask=False,
                return_token_type_ids=False,
            )["input_ids"]
        if self._special:
            for place, ids in enumerate(rows):
                if self._made_special(texts[place], ids):
                    rows[place] = self._as_text(texts[place])["input_ids"]
        return rows

    def continued(self, texts: list[str], before: str) -> list[list[int]]:
        """Tokenise texts that follow another one, as they are tokenised behind it.

        Args:
            texts: the texts.
            before: how the other text ends.
        """
        other, *both = self([before, *(before + text for text in texts)])
        return [
            ids[len(other) :] if ids[: len(other)] == other else self([text])[0]
            for text, ids in zip(texts, both, strict=True)
        ]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Return (start, end) of the characters of each token. Raises: ValueError for a slow tokenizer."""
        if not self.tokenizer.is_fast:
            raise ValueError("character offsets need a fast tokenizer; load it with use_fast=True")
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        if self._special and self._made_special(text, encoded["input_ids"]):
            encoded = self._as_text(text, return_offsets_mapping=True)
        return encoded["offset_mapping"]

    def _made_special(self, text: str, ids: list[int]) -> bool:
        """Return True if words of the text became a special token."""
        return not self._control.isdisjoint(ids) or (
            self._unknown in self._special and self._unknown in ids and self._special[self._unknown] in text
        )

    def _as_text(self, text: str, **options) -> dict:
        """Tokenise a text that has the words of a special token, with a changed copy of the tokenizer."""
        if not self.tokenizer.is_fast:  # those in Python would split added tokens of every kind
            return {"input_ids": self._in_parts(text)}
        options |= {"add_special_tokens": False, "verbose": False, "split_special_tokens": True}
        if self._own is None:
            self._own = copy.deepcopy(self.tokenizer)
        encoded = self._own(text, **options)
        if not self._control.isdisjoint(encoded["input_ids"]):
            _hide_pieces(self._own, {self._special[i]: i for i in self._control})
            encoded = self._own(text, **options)
        return encoded

    def _in_parts(self, text: str) -> list[int]:
        plain = {words: i for i, words in self._added.items() if i not in self._special}
        words = sorted(plain, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, words))})", text) if words else [text]
        ids: list[int] = []
        for part in filter(None, parts):
            ids += (
                [plain[part]]
                if part in plain
                else self.tokenizer(part, add_special_tokens=False, verbose=False, split_special_tokens=True)[
                    "input_ids"
                ]
            )
        return ids


def _hide_pieces(tokenizer, pieces: dict[str, int]) -> None:
    """Keep the model of a fast tokenizer from finding these pieces in any text, without changing other ids.

    Unigram models (T5) and whole-word models take every entry of their vocabulary for a piece, so these entries are
    renamed to random texts.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    names = {piece: f"{secrets.token_hex(16)} {i}" for piece, i in pieces.items()}
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if "merges" in model:
        model["merges"] = [
            pair
            for pair in model["merges"]
            if "".join(_halves(pair)) not in names and names.keys().isdisjoint(_halves(pair))
        ]
    bare = {"version": state["version"], "model": model, "added_tokens": []}
    bare |= dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    tokenizer.backend_tokenizer.model = type(tokenizer.backend_tokenizer).from_str(json.dumps(bare)).model


def _halves(pair: list[str] | str) -> list[str]:
    return pair.split(" ") if isinstance(pair, str) else pair
