"""Which special tokens stand around a prompt: those that the tokenizer puts there, or always its BOS token."""

from __future__ import annotations

from typing import Any


def choose(rule: str, encoder_decoder: bool) -> str:
    """Return "tokenizer" or "bos" for the rule of a config, which may be "auto".

    Args:
        rule: ``special_tokens`` of `QPeftConfig`.
        encoder_decoder: whether the LM is an encoder–decoder, which always reads what its tokenizer makes.
    """
    return "tokenizer" if encoder_decoder or rule == "auto" else rule


def special_tokens_around(tokenizer: Any, rule: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Find the special tokens before and after a text.

    Args:
        tokenizer: a transformers tokenizer.
        rule: "tokenizer" takes what the tokenizer itself puts around a text; "bos" takes its BOS token, if it has one,
            whether or not it puts it there.
    """
    if rule == "bos":
        return (() if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)), ()
    text, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    for start in range(len(whole) - len(text) + 1):
        if whole[start : start + len(text)] == text:
            return tuple(whole[:start]), tuple(whole[start + len(text) :])
    return (), ()


def special_tokens_of_pair(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Find the special tokens before, between and after two texts that the tokenizer joins.

    Args:
        tokenizer: a transformers tokenizer.
    """
    first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in "ab")
    whole = tokenizer("a", "b")["input_ids"]
    start = _find(first, whole, 0)
    end = start + len(first)
    behind = _find(second, whole, end)
    return tuple(whole[:start]), tuple(whole[end:behind]), tuple(whole[behind + len(second) :])


def _find(part: list[int], whole: list[int], start: int) -> int:
    return next(i for i in range(start, len(whole)) if whole[i : i + len(part)] == part)
