"""Questions behind the query, and the tokens that answer them, for the scores that read an answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..config import QPeftConfig
from ..utils.text_tokens import TextTokenizer

TokenSet = tuple[int, ...]  # tokens that give the same answer


def asked_text(config: QPeftConfig) -> str:
    """Return the text behind the query, after which the answer is read; "" where the query itself is scored."""
    if config.score == "likelihood":
        return ""
    usual = f"Relevance from 0 to {config.max_grade}:" if config.score == "graded" else "Relevant:"
    return usual if config.ask is None else config.ask.strip()


def answer_tokens(tokenizer: Any, config: QPeftConfig) -> tuple[TokenSet, ...]:
    """Find the tokens of each answer: those of yes and of no, or of each grade from 0 on.

    Args:
        tokenizer: of the LM.
        config: names the score, its words, and whether they are read exactly as written.
    Returns: the sets; () where the query itself is scored.
    Raises: ValueError for a word that is no single token, or a token that is in two sets.
    """
    if config.score == "likelihood":
        return ()
    words = _Words(tokenizer, config.exact_words)
    if config.score == "graded":
        sets = {f"grade {grade}": words.tokens((str(grade),), "max_grade") for grade in range(config.max_grade + 1)}
    else:
        sets = {name: words.tokens(getattr(config, name), name) for name in ("yes_words", "no_words")}
    seen: dict[int, str] = {}
    for name, ids in sets.items():
        for i in ids:
            if i in seen:
                raise ValueError(
                    f"QPeftConfig: {seen[i]} and {name} both have the token {tokenizer.convert_ids_to_tokens(i)!r}; "
                    "take other words, or set exact_words=True"
                )
            seen[i] = name
    return tuple(sets.values())


class _Words:
    """Finds the tokens of words that stand behind a text.

    Args:
        tokenizer: of the LM.
        exact: whether a word is taken as it is written; otherwise in any casing, with and without a space before it.
    """

    def __init__(self, tokenizer: Any, exact: bool) -> None:
        self._tokenizer, self._exact = tokenizer, exact
        self._encode = TextTokenizer(tokenizer, special_tokens=True)

    def tokens(self, words: Iterable[str], option: str) -> TokenSet:
        """Return the single tokens that write one of the words, in ascending order.

        Args:
            words: the words.
            option: the option that they come from, for messages.
        Raises: ValueError for a word of which no form is a single token.
        """
        found: set[int] = set()
        for word in words:
            forms = [self._ids(form) for form in self._forms(word)]
            single = {ids[0] for ids in forms if len(ids) == 1} - {self._tokenizer.unk_token_id}
            if not single:
                pieces = ", ".join(map(repr, self._tokenizer.convert_ids_to_tokens(forms[0])))
                remedy = "use max_grade=9 or less" if option == "max_grade" else "name words of one token"
                raise ValueError(
                    f"QPeftConfig: {option}: {word!r} must be a single token of the LM's tokenizer, got {pieces}; "
                    f"{remedy}"
                )
            found |= single
        return tuple(sorted(found))

    def _forms(self, word: str) -> list[str]:
        if self._exact:
            return [word]
        bare = word.strip()
        casings = dict.fromkeys((bare, bare.lower(), bare.capitalize(), bare.upper()))
        return [before + casing for casing in casings for before in ("", " ")]

    def _ids(self, text: str) -> list[int]:
        """Tokenise a text as it stands behind another one."""
        return self._encode.continued([text], "a:" if text.startswith(" ") else "\n")[0]
