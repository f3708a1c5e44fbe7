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
