"""The template "chat": the prompt as a conversation, in the chat template of the LM's tokenizer.

    <user> {instruction} Passage: {title} {text}\\n  |  hints: <clue vectors>\\n{instruction} <assistant> {query}

An instruction of one query stands behind the passage and its clues: ``Instruction: {instruction of the query}\\n``.
``<user>`` and ``<assistant>`` stand for whatever the chat template writes, a system turn of its own included. The query
is the answer of the LM. The token that ends the answer is not scored: how an LM ends its turns says nothing about a
document, and no other template of a causal LM scores an end.

The chat template is rendered once, with markers for document and query, and what stands between them is tokenised. A
date that it writes is always the same, since prefixes would otherwise change from day to day.
"""

from __future__ import annotations

import datetime
import re
from typing import Any

from ...config import QPeftConfig
from ...utils.text import shorten
from ..pieces import SuffixPieces
from .base import AroundInstruction, TemplatePieces
from .words import Words

_PASSAGE = "\n\nPassage:"
_DAY = datetime.date(2024, 7, 26)  # the date that Llama's chat template writes where it cannot ask for today's
_TODAY = re.compile(r"""strftime_now\(\s*(["'])([^"'\n]*)\1\s*\)""")
_DOCUMENT, _QUERY = "QpeftDocumentGoesHere", "QpeftQueryGoesHere"
_REFUSED = "QPeftConfig: template='chat' "


def chat_pieces(words: Words, config: QPeftConfig) -> TemplatePieces:
    """Make the pieces (`base.Template`). Raises: ValueError without a chat template that keeps texts as they are."""
    P, instruction = config.num_virtual_tokens, config.instruction.strip()
    passage = _PASSAGE if instruction or P is not None else _PASSAGE.lstrip()
    asked = instruction or "Question:"
    begin, answer = _around(words.tokenizer, f"{instruction}{passage} {_DOCUMENT}\n{asked}")
    request = f"{asked}{answer}".removesuffix(" ")
    (head,), soft_prompt_start = words(f"{begin}{instruction}{passage}"), 0
    instruction_ids: tuple[int, ...] = ()
    if P is not None:
        before = words(begin)[0]
        head, soft_prompt_start = before + (0,) * P + words.continued(passage), len(before)
        instruction_ids = words.continued(instruction, "\n")
    return TemplatePieces(
        head=head,
        tail=words.continued("\n"),
        suffix=SuffixPieces(
            hints=words.continued("hints:", "\n"),
            question=words.continued(f"\n{request}"),
            bare_question=words.continued(request, "\n"),
        ),
        around_instruction=AroundInstruction(
            behind_clues=words.continued("\nInstruction:"),
            bare=words.continued("Instruction:", "\n"),
            question=words.continued(f"\n{request}"),
        ),
        instruction_ids=instruction_ids,
        soft_prompt_start=soft_prompt_start,
        query_follows_word=answer.endswith(" "),
        query_is_answer=True,
    )


def _around(tokenizer: Any, content: str) -> tuple[str, str]:
    """Render a conversation of two turns, and return what stands before the user's content and between both contents.

    Args:
        tokenizer: with a chat template.
        content: what the user says, with ``_DOCUMENT`` in it.
    """
    try:
        template = tokenizer.get_chat_template()
    except (AttributeError, ValueError):
        raise ValueError(
            f"{_REFUSED}needs an LM with a chat template, but its tokenizer has none; use template='qpeft'"
        ) from None
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": _QUERY}]
    template = _TODAY.sub(lambda call: repr(_DAY.strftime(call[2])), template)
    if "strftime_now" in template:  # with a format that is not written there, or under another name
        template = f"{{% macro strftime_now(format) %}}{_DAY:%d %b %Y}{{% endmacro %}}{template}"
    try:
        text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    except Exception as error:  # whatever a template of somebody else's does wrong
        raise ValueError(
            f"{_REFUSED}cannot use the LM's chat template: {shorten(' '.join(str(error).split()))}; use "
            "template='qpeft'"
        ) from None
    begin, _, rest = text.partition(content)
    answer, _, _ = rest.partition(_QUERY)
    if (text.count(_DOCUMENT), text.count(_QUERY)) != (1, 1) or text.count(content) != 1 or _QUERY not in rest:
        raise ValueError(
            f"{_REFUSED}needs a chat template that writes what user and assistant say once, unchanged and in this "
            "order; this LM's does not: use template='qpeft'"
        )
    return begin, answer
