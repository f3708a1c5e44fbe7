"""Token ids of users' texts, in which the words of a special token (``</s>``, ``<|im_start|>``) are text by default."""

from __future__ import annotations

import copy
import json
import re
import secrets

_TEXTS_AT_ONCE = 256  # a fast tokenizer keeps a hundred bytes a token until all texts of a call are done


class TextTokenizer:
    """Turns texts into token ids, without special tokens around them.

    Tokens that were added to the vocabulary and are not special stay tokens, and a text without the words of a special
    token has the same ids either way.

    Args:
        tokenizer: a transformers tokenizer; it is not changed.
        special_tokens: whether the words of a special token become its id, as the tokenizer does by itself.
    """

    def __init__(self, tokenizer, special_tokens: bool) -> None:
        self.tokenizer, self._options, self._added = tokenizer, {}, None
        if special_tokens:
            return
        added = tokenizer.added_tokens_decoder
        unknown = tokenizer.unk_token_id  # what a text without any special token may give, too
        self._special = {i: str(token.content) for i, token in added.items() if token.special and i != unknown}
        self._special |= {i: token for i, token in zip(tokenizer.all_special_ids, tokenizer.all_special_tokens,
                                                       strict=True) if i != unknown}
        if not self._special:
            return
        if not tokenizer.is_fast:  # those in Python would split added tokens of every kind
            self._added = {str(token.content): i for i, token in added.items() if i not in self._special}
            return
        self._options = {"split_special_tokens": True}
        if self._gives_special_ids():
            self.tokenizer = _without_pieces(tokenizer, self._special)

    def __call__(self, texts: list[str]) -> list[list[int]]:
        ids = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            # verbose=False: a long document is cut by us, so the tokenizer's length warning would be noise
            ids += self.tokenizer(texts[start : start + _TEXTS_AT_ONCE], add_special_tokens=False, verbose=False,
                                  return_attention_mask=False, return_token_type_ids=False,
                                  **self._options)["input_ids"]
        if self._added is not None:
            for i, text in enumerate(texts):
                if any(words in text for words in self._special.values()):
                    ids[i] = self._in_parts(text)
        return ids

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """The characters of each token. Raises: ValueError for a tokenizer that cannot say (a slow one)."""
        if not self.tokenizer.is_fast:
            raise ValueError("character offsets need a fast tokenizer; load it with use_fast=True")
        return self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False,
                              **self._options)["offset_mapping"]

    def _gives_special_ids(self) -> bool:
        """Whether the words of a special token still give its id: they are a piece like any other to some models."""
        texts = [around.format(words) for words in self._special.values() for around in ("{}", "a{}b", "a {} b")]
        return any(not self._special.keys().isdisjoint(ids) for ids in self(texts))

    def _in_parts(self, text: str) -> list[int]:
        """Ids of a text with the words of a special token, by a tokenizer in Python."""
        words = sorted(self._added, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, words))})", text) if words else [text]
        ids = []
        for part in filter(None, parts):
            ids += [self._added[part]] if part in self._added else self.tokenizer(
                part, add_special_tokens=False, verbose=False, split_special_tokens=True)["input_ids"]
        return ids


def _without_pieces(tokenizer, pieces: dict[int, str]):
    """A copy of a fast tokenizer whose model cannot find these pieces, by id, in any text; other ids stay as they are.

    Unigram models (T5) and whole-word ones take every entry of their vocabulary for a piece. Here the entries get names
    that nobody can write.
    """
    tokenizer = copy.deepcopy(tokenizer)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    names = {piece: f"{secrets.token_hex(16)} {i}" for i, piece in pieces.items()}
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if "".join(_halves(pair)) not in names
                           and names.keys().isdisjoint(_halves(pair))]
    alone = {"version": state["version"], "model": model, "added_tokens": []}
    alone |= dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    tokenizer.backend_tokenizer.model = type(tokenizer.backend_tokenizer).from_str(json.dumps(alone)).model
    return tokenizer


def _halves(pair: list[str] | str) -> list[str]:
    return pair.split(" ") if isinstance(pair, str) else pair
