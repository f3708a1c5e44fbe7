"""Tokenise the words of a template, piece by piece, so that the pieces read like one text."""

from __future__ import annotations

from typing import Any

from ...utils.text_tokens import TextTokenizer
from ..special_tokens import special_tokens_around


class Words:
    """Tokenises the words of templates; the words of special tokens become these.

    Args:
        tokenizer: a transformers tokenizer.
        special_tokens: "tokenizer" or "bos" (`special_tokens.choose`).
    Attributes:
        before, after: the special tokens around a text.
    """

    def __init__(self, tokenizer: Any, special_tokens: str) -> None:
        self.tokenizer = tokenizer
        self._encode = TextTokenizer(tokenizer, special_tokens=True)
        # SentencePiece tokenizers put a space before each piece; byte-level ones need it in the text
        first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"][:1])
        self._adds_space = bool(first) and first[0].startswith("▁")
        self.before, self.after = special_tokens_around(tokenizer, special_tokens)

    def __call__(self, *texts: str) -> list[tuple[int, ...]]:
        """Tokenise texts that stand by themselves."""
        return [tuple(ids) for ids in self._encode(list(texts))]

    def spaced(self, text: str) -> str:
        """Return the text to tokenise for one that follows a word and a space."""
        return text if self._adds_space or not text else f" {text}"

    def continued(self, text: str, before: str = "a") -> tuple[int, ...]:
        """Tokenise a text that follows another one without a space.

        Args:
            text: the text.
            before: how the other text ends.
        """
        return tuple(self._encode.continued([text], before)[0])
